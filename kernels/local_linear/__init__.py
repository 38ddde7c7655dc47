"""Softmax attention with a first-order correction: local linear attention, and Parallax, which learns what it solves for."""

import jax

from plait.kernels.dispatch import Implementation, Op
from plait.kernels.local_linear import chunked, reference
from plait.kernels.local_linear.call import LocalLinearCall, pair_products
from plait.kernels.masks import Mask
from plait.kernels.tokens import Tokens

__all__ = ["local_linear", "local_linear_rows", "pair_products"]

Array = jax.Array

_op = Op(
    "local_linear",
    chunked=Implementation(chunked.local_linear),
    reference=Implementation(reference.local_linear),
)


def local_linear(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    probe: Array | None = None,
    ridge: float | None = None,
    at: Tokens | None = None,
    kv_at: Tokens | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Array:
    """Each query's weighted mean of the values it may see, less what the probe explains of it.

    o_i = sum_j A_ij v_j,    A_ij = p_ij (1 - (k_j - E_i k) . r_i),    p_i = softmax_j(scale q_i . k_j),    E_i k = sum_j p_ij k_j,

    that is o_i = E_i v - Cov_i(v, k) r_i over the keys j that the mask shows to i. Rows of A sum to 1 and may hold negative numbers. A
    query that sees nothing gives zeros. With a ridge in place of a probe,

    r_i = (Cov_i(k, k) + ridge max_j p_ij I)^-1 (E_i k - q_i),

    the local linear regression of v on k at q_i, whose weights exp(scale q_i . k_j) are taken relative to the largest one.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      k: [B, S, Hkv, K]; Hkv divides H, and head h uses k and v of head h // (H / Hkv).
      v: [B, S, Hkv, V].
      mask: which positions a query sees in its segment.
      probe: r [B, T, H, K]; its product with keys is not scaled.
      ridge: above 0; exactly one of both is given.
      at: what is known of the tokens; those of one segment see each other. None is one segment from position 0.
      kv_at: of the keys, where they are not the queries' own tokens, such as a cache; segment id 0 is an empty entry.
      scale: multiplies the products of queries and keys; None is K^-1/2.
      implementation: "auto", "chunked" or "reference".

    Returns:
      o [B, T, H, V] in q's dtype.

    Raises:
      ValueError: a shape, ratio, option or known segment id does not fit, or the implementation is unknown.

    Source: Local Linear Attention, arXiv 2510.01450; Parallax, 2605.29157, algorithm 1. The form of r is the README's.
    """
    return _op(implementation, _call("local_linear", q, k, v, mask, probe, ridge, at, kv_at, scale))


def local_linear_rows(
    q: Array,
    k: Array,
    rows: Array,
    *,
    mask: Mask,
    probe: Array | None = None,
    ridge: float | None = None,
    at: Tokens | None = None,
    scale: float | None = None,
) -> Array:
    """Rows A [B, H, R, S] float32 with `o[:, rows] = A @ v` for `local_linear`; `rows` are int32 [R] query indices, may be traced."""
    call = _call("local_linear_rows", q, k, None, mask, probe, ridge, at, None, scale)
    queries, keys = call.sides
    chosen = call.on_queries(lambda x: x[:, rows])
    weights = reference.weights(chosen, jax.tree.map(lambda x: x[:, rows], queries), keys)
    return weights.reshape(q.shape[0], q.shape[2], rows.shape[0], k.shape[1]).astype("float32")


def _call(
    op: str,
    q: Array,
    k: Array,
    v: Array | None,
    mask: Mask,
    probe: Array | None,
    ridge: float | None,
    at: Tokens | None,
    kv_at: Tokens | None,
    scale: float | None,
) -> LocalLinearCall:
    return LocalLinearCall.of(op, q=q, k=k, v=v, mask=mask, probe=probe, ridge=ridge, at=at, kv_at=kv_at, scale=scale)
