"""Reshapes, one file each, found by their registered name."""
