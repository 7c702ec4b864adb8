"""From text to windows of calibration tokens."""
