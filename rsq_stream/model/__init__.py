"""A decoder block as data and as staged functions."""
