"""Mixers that carry a state of fixed size."""
