"""Model types that are known and cannot be read yet."""

WAITING = {
    "doge": "its attention under masks that it makes of its values, and its scaled residuals",
    "deepseek_v32": "its sparse attention by an index",
    "hgrn2": "forget gates whose lower bounds are sums over all layers",
    "rwkv7": "its channel mixer, which reads the token before, and a norm of the embedding",
    "zamba": "layers that share their parameters",
    "zamba2": "layers that share their parameters",
}
"""What each waits for."""
