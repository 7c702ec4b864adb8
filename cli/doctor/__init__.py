"""What this machine can do, checked."""
