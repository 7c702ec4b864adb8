"""The work folder on disk: activations and journal, durable; no maths."""
