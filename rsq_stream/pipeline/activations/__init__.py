"""Calibration activations on their way through the blocks."""
