"""The indexer's divergence over tokens that queries choose one by one, for TPU."""
