"""Position encodings: one file each, found by its registered name."""
