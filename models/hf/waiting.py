"""Model types that are known and cannot be read yet."""

WAITING = {
    "deepseek_v32": "its sparse attention by an index",
}
"""What each waits for."""
