"""The run: block after block, durable at every step."""
