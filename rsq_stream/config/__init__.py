"""What is asked for, as frozen data: plans, options, and how they are checked."""
