"""Rotate: Hadamard matrices, and orthogonal matrices made of them."""
