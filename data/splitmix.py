"""SplitMix64, from which every order and every draw of the data comes, so that none depends on a library's generator."""

from __future__ import annotations

import hashlib

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""What a state advances by."""


def mix(x: np.ndarray) -> np.ndarray:
    """The output of the states `x`, uint64: a bijection in which every input bit reaches every output bit."""
    x = x + GAMMA  # modulo 2^64, as are the products
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def salted(x: np.ndarray, *salt: object) -> np.ndarray:
    """`x`, uint64, with a digest of the salt mixed in."""
    digest = hashlib.blake2b(repr(salt).encode(), digest_size=8).digest()
    return mix(x.astype(np.uint64) ^ np.frombuffer(digest, "<u8"))
