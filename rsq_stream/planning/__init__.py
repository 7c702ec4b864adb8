"""What is decided before the first block: plans, memory, time, devices."""
