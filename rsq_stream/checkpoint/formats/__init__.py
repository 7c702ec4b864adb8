"""How an output is stored, one file a format."""
