"""The bundled demo model, its calibration text and its held-out text."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
CALIBRATION = Path(__file__).parent / "calibration.txt"
HELD_OUT = Path(__file__).parent / "heldout.txt"
