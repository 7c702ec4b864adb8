"""What bits cost each linear, measured, and the cheapest choice."""
