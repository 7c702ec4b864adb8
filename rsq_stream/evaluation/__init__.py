"""Perplexity and samples, streamed block by block."""
