"""Faces of the hot loops: checked, launched on the device, or run by a CPU twin."""
