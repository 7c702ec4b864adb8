"""Options of the commands, declared once and resolved."""
