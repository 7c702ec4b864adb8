"""How much memory each stage of a run takes."""
