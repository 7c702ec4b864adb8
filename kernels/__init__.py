"""CUDA C++ sources, found as package data; ``rsq_stream.ops`` compiles and launches."""
