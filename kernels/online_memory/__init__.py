"""A memory whose weights learn while it reads, by gradient (Titans, Miras)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from plait.kernels.dispatch import Implementation, Op
from plait.kernels.online_memory import chunked, reference
from plait.kernels.online_memory.call import MemoryCall, MemoryState
from plait.kernels.online_memory.rule import Rule, Weights
from plait.kernels.shapes import check_floating, check_log_decay, check_rank, check_shape, check_tokens
from plait.kernels.tokens import Tokens

__all__ = ["MemoryState", "Rule", "empty_memory", "online_memory"]

Array = jax.Array

_op = Op(
    "online_memory",
    chunked=Implementation(chunked.online_memory, per_device=True),
    reference=Implementation(reference.online_memory),
)


def online_memory(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    step: Array,
    *,
    initial: Weights,
    rule: Rule,
    momentum: Array | None = None,
    threshold: Array | None = None,
    initial_state: MemoryState | None = None,
    at: Tokens | None = None,
    implementation: str = "auto",
) -> tuple[Array, MemoryState, Array]:
    """What each token reads from a memory M, a small network, that has learned the keys and values up to it.

    S_t = exp(momentum_t) S_{t-1} - step_t grad l(M_c(k_t), v_t),    A_t = exp(g_t) A_{t-1} + S_t,    W_t = rule(A_t),    o_t = M_t(q_t),

    M_t having the weights W_t, and the gradient being in them, at the memory M_c before the first token of t's chunk of
    `rule.chunk_size` tokens: with 1 it is M_{t-1}. Chunks are counted from the start of the document. Without momentum S_t is the
    write alone.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      k: [B, T, H, K].
      v: [B, T, H, K].
      g: float32 log of what is kept, at most 0: [B, T, H], or [B, T, H, K] for one a channel, of keys along the inputs of the first of
        two layers and of values along the outputs of the last.
      step: how far each token's gradient moves the memory, at least 0, as g.
      initial: what a document begins with, the A_0 of each layer: [H, K, K] of a linear memory, or [H, K, M] and [H, M, K], ...
      rule: the memory and how it learns.
      momentum: float32 log of the momentum that is kept, at most 0, [B, T, H]; None for no momentum.
      threshold: of the bias `huber`, [B, T, H].
      initial_state: of the first token's segment; None is a document's beginning.
      at: what is known of the tokens; the memory is `initial` at the start of each segment but the first, and padding gives zeros and is
        passed over. None is one segment.
      implementation: "auto", "chunked" or "reference".

    Returns:
      o [B, T, H, K] in q's dtype, the state after the last token that is not padding, and the Frobenius norm of each token's
      step_t grad l, [B, T, H].

    Raises:
      ValueError: a shape, option or known value does not fit, or the implementation is unknown.

    Source: Titans, arXiv 2501.00663, equations 8 to 18; Miras, 2504.13173, section 5.
    """
    op, (batch, length, heads, dim) = "online_memory", _shape(q)
    check_floating(op, q=q, k=k, v=v)
    for name, array in (("k", k), ("v", v)):
        check_shape(op, name, array, q.shape, "[B, T, H, K] as q")
    check_tokens(op, "at", at, batch, length)
    check_log_decay(op, g)
    channels = (1, dim) if len(initial) < 3 else (1,)
    for name, gate in (("g", g), ("step", step)):
        if gate.shape != (batch, length, heads) and gate.shape not in [(batch, length, heads, n) for n in channels[1:]]:
            raise ValueError(
                f"{op}: {name}.shape={gate.shape} must be [B, T, H], or with one or two layers [B, T, H, K]; reshape it"
            )
    _check_layers(op, initial, heads, dim)
    if (threshold is not None) != (rule.bias == "huber"):
        raise ValueError(f"{op}: threshold belongs to the bias 'huber', and that needs one; the rule's bias is {rule.bias!r}")
    if rule.retention == "kl" and (momentum is not None or len(initial) != 2):
        raise ValueError(
            f"{op}: the retention 'kl' is of two layers and without momentum; not of {len(initial)} and {momentum is not None}"
        )
    at = (at or Tokens()).placed(batch, length)
    dtype = jnp.result_type(jnp.float32, q)
    state = empty_memory(initial, batch, momentum is not None) if initial_state is None else initial_state
    wide = lambda weights: tuple(w.astype(dtype) for w in weights)
    spread = lambda gate: gate[..., None] if gate.ndim == 3 else gate
    call = MemoryCall(
        q=q,
        k=k,
        v=v,
        g=spread(g),
        step=spread(step),
        momentum=momentum,
        threshold=threshold,
        initial=tuple(initial),
        segment_ids=at.segment_ids,
        positions=at.positions,
        accumulated=wide(state.accumulated),
        speed=wide(state.momentum),
        opened=wide(state.opened),
        chunk=state.chunk,
        rule=rule,
    )
    o, accumulated, speed, opened, chunk, written = _op(implementation, call)
    return o, MemoryState(accumulated, speed, opened, chunk), written


def empty_memory(initial: Weights, batch: int, with_momentum: bool) -> MemoryState:
    """The state of `batch` sequences before their first token, which puts `initial` in its place."""
    zeros = tuple(jnp.zeros((batch, *w.shape), jnp.float32) for w in initial)
    return MemoryState(zeros, zeros if with_momentum else (), zeros, jnp.full((batch,), -1, jnp.int32))


def _shape(q: Array) -> tuple[int, ...]:
    check_rank("online_memory", "q", q, "[B, T, H, K]")
    return q.shape


def _check_layers(op: str, initial: Weights, heads: int, dim: int) -> None:
    """Raises ValueError unless the layers lead from K to K."""
    widths = [dim, *(w.shape[-1] for w in initial[:-1]), dim]
    for layer, weights in enumerate(initial):
        expected = (heads, widths[layer], widths[layer + 1])
        check_shape(op, f"initial[{layer}]", weights, expected, "[H, I, O] with the widths of the layers beside it")
