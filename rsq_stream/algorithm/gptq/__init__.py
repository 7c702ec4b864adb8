"""Quantize: Hessian, factor, solver, and what improves on it."""
