"""What ``--bpw`` measures: at which bits, with how many tokens, and in which unit."""

PROBE_TOKENS = 8192
"""Of the calibration set, as many tokens see each linear rounded."""


BITS = (2, 3, 4, 5, 6, 8)


PROBE_BITS = 3


Costs = dict[str, dict[int, float]]
"""By linear and bits: the mean share of a token's output energy that is lost."""
