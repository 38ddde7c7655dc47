"""Model types that are known and cannot be read yet."""

WAITING = {
    "doge": "its attention under masks that it makes of its values, and its scaled residuals",
    "deepseek_v32": "its sparse attention by an index",
    "zamba": "layers that share their parameters",
    "zamba2": "layers that share their parameters",
}
"""What each waits for."""
