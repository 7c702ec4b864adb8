"""Compile kernels, keep them, launch them."""
