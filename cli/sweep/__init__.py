"""Many runs from one file: places, workers, the table."""
