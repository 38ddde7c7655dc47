"""Mixers that look at every visible token."""
