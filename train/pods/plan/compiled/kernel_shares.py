"""What share of a TPU's peak each kernel reaches by the compiler's static cycles, as `benchmarks/kernel_shares.py` finds them."""

SHARES: dict[str, dict[str, dict[int, float]]] = {}
