"""Disk only: shards, activations, journal and output; no maths."""
