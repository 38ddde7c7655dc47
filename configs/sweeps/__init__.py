"""Studies: which runs answer a question. One file each, found by its registered name."""
