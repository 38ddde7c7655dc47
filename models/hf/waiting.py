"""Model types that are known and cannot be read yet."""

WAITING = {
    "zamba": "layers that share their parameters",
    "zamba2": "layers that share their parameters",
}
"""What each waits for."""
