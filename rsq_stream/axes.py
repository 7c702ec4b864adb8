"""The axis letters that tensor names end in, for the whole code base.

====== ==========================================================
letter axis
====== ==========================================================
B      sequences of a unit or of the calibration set
T      tokens of a sequence, or of a whole unit laid end to end
D      width of the residual stream
H      attention heads (query heads unless said otherwise)
K      head width
I, O   inputs and outputs of a linear (``weight_OI``)
R      a tile of output rows
C      columns of one block of the sweep
G      groups along I that share a scale
L      levels of a grid, 2**bits
P      candidate scales of a clip search
V      vocabulary
====== ==========================================================

A suffix is a promise; where a jaxtyping annotation stands beside it, the test
run checks that promise. Offsets and sizes are in elements unless the name says
``_bytes``; times end in ``_s``, ratios of energies in ``_db``.
"""

SEQUENCE, TOKEN, WIDTH = 0, 1, 2
"""Axis numbers of an activation slot, ``x_BTD``."""
