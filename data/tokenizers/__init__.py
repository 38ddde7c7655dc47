"""Text to token ids and back: bytes, vocabularies learned here, and published ones."""
