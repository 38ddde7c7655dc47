"""Mixers whose queries see chosen tokens only."""
