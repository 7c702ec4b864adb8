"""Model folders, read: a source, or what this tool made."""
