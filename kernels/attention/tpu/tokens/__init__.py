"""Attention to tokens that queries choose one by one, for TPU."""
