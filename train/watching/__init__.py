"""Watchers of a run: what they see in its metrics, write down and do about it."""
