"""Mixers made of others side by side."""
