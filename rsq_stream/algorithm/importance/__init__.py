"""Scale: how much each calibration token counts, one file a strategy."""
