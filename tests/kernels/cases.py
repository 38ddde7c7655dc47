"""The ops and inputs that the kernel suites run over."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait import kernels
from plait.kernels import Tokens
from plait.kernels.tolerances import wave

BATCH, NUM_QK_HEADS, NUM_HEADS, KEY_DIM, VALUE_DIM = 2, 1, 2, 8, 4

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""`jax.jit` that compiles in half the time and runs slower: right for inputs this small."""


@dataclass(frozen=True)
class Recurrence:
    """One linear recurrence: its public function, its rows, and how its gates look."""

    op: Callable[..., Any]
    rows: Callable[..., Any]
    g: str | None
    """"scalar", "vector" or None."""
    beta: bool = False
    moves: bool = False
    """Whether it has the vectors a and b of the diagonal plus rank one: -n and r n, n of unit norm and r in (0, 1) by channel."""

    def inputs(
        self,
        length: int,
        *,
        decay: str = "mixed",
        keys: str = "random",
        beta: float | None = None,
        dtype: Any = jnp.float32,
        seed: int = 0,
    ) -> dict[str, jax.Array]:
        """Random arguments by name.

        `decay` is none, weak, strong, total (every g about -1e4) or mixed (a g of -20 beside one of nearly 0); `keys` are random, close
        (one direction and noise) or same; `beta` is that of all tokens, or random in (0, 2).
        """
        rng = np.random.default_rng(seed)
        normal = lambda *shape: rng.standard_normal(shape)
        q, k = normal(2, BATCH, length, NUM_QK_HEADS, KEY_DIM)
        if keys != "random":
            k = k[:, :1] + {"close": 0.3, "same": 0.0}[keys] * k
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        named = {"q": q, "k": k, "v": normal(BATCH, length, NUM_HEADS, VALUE_DIM)}
        if self.g is not None:
            shape = (BATCH, length, NUM_HEADS) + ((KEY_DIM,) if self.g == "vector" else ())
            kinds = {"none": (0.0,), "weak": (-1e-4,), "strong": (-20.0,), "total": (-1e4,)}
            kinds |= {"mixed": (-20.0, -1.0, -0.05, -1e-4), "rare": (-1.5, *[-1e-4] * 31)}
            named["g"] = rng.choice(kinds[decay], shape) * rng.uniform(0.5, 1.0, shape)
        if self.beta:
            shape = (BATCH, length, NUM_HEADS)
            named["beta"] = 2 / (1 + np.exp(-normal(*shape))) if beta is None else np.full(shape, beta)
        if self.moves:
            n = normal(BATCH, length, NUM_QK_HEADS, KEY_DIM)
            n /= np.linalg.norm(n, axis=-1, keepdims=True)
            named |= {"a": -n, "b": n * rng.uniform(0, 1, n.shape)}
        keep = {"g": jnp.float32}  # log decay is float32 whatever the rest is
        return {name: jnp.asarray(x, keep.get(name, dtype)) for name, x in named.items()}

    def call(self, inputs: dict[str, jax.Array], **options: Any) -> Any:
        """The op on `inputs`, with g=None where it has no gate."""
        return self.op(*self._positional(inputs, "qkv"), **options)

    def implied(self, inputs: dict[str, jax.Array], rows: jax.Array, **options: Any) -> jax.Array:
        """The implied attention rows for the same inputs."""
        return self.rows(*self._positional(inputs, "qk"), rows, **options)

    def _positional(self, inputs: dict[str, jax.Array], names: str) -> list[Any]:
        moves = ("beta",) * self.beta + ("a", "b") * self.moves
        return [inputs[name] for name in names] + [inputs.get("g"), *(inputs[name] for name in moves)]


RECURRENCES = {
    "scalar_decay": Recurrence(kernels.decay, kernels.decay_rows, "scalar"),
    "vector_decay": Recurrence(kernels.decay, kernels.decay_rows, "vector"),
    "deltanet": Recurrence(kernels.delta_rule, kernels.delta_rule_rows, None, beta=True),
    "gated_deltanet": Recurrence(kernels.delta_rule, kernels.delta_rule_rows, "scalar", beta=True),
    "kda": Recurrence(kernels.delta_rule, kernels.delta_rule_rows, "vector", beta=True),
    "dplr": Recurrence(kernels.dplr, kernels.dplr_rows, "vector", moves=True),
}
WITH_KERNELS = {name: recurrence for name, recurrence in RECURRENCES.items() if not recurrence.moves}
"""Those that have kernels for accelerators."""


def state(seed: int = 1) -> jax.Array:
    """A recurrent state [B, Hv, K, V]."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((BATCH, NUM_HEADS, KEY_DIM, VALUE_DIM)), jnp.float32)


def segments(length: int, layout: str) -> jax.Array:
    """Segment ids [B, T]: `one` segment, `several` short ones with padding among and after them, `long` with a padded tail, or `left`,
    padding and then two."""
    ids = np.ones((BATCH, length), np.int32)
    if layout == "several":
        rng = np.random.default_rng(length)
        for row in ids:
            cuts = np.sort(rng.choice(np.arange(1, length), min(6, length - 1), replace=False))
            row[:] = np.searchsorted(cuts, np.arange(length), side="right") + 1
            row[row == 3] = 0
            row[-2:] = 0
    elif layout == "left":
        ids[:, 3 * length // 4 :] = 2
        ids[0, : length // 5], ids[1, : length // 2] = 0, 0
    elif layout == "long":
        ids[:, -max(1, length // 8) :] = 0
    return jnp.asarray(ids)


@cache
def jitted(name: str, implementation: str, chunk_size: int = 64) -> Callable[..., Any]:
    """A jitted function of (inputs, initial_state, segment_ids) to (o, final_state)."""
    options = {"implementation": implementation, "chunk_size": chunk_size}
    return quick_jit(
        lambda inputs, state, ids=None: RECURRENCES[name].call(inputs, initial_state=state, at=Tokens(None, ids), **options)
    )


@cache
def values_and_gradients(name: str, implementation: str, chunk_size: int = 64) -> Callable[..., Any]:
    """A jitted function of (inputs, initial_state, segment_ids) to named outputs and the gradients of a fixed projection."""
    recurrence = RECURRENCES[name]

    @quick_jit
    def run(inputs: dict[str, jax.Array], initial_state: jax.Array, segment_ids: jax.Array | None) -> Any:
        def outputs(inputs: dict[str, jax.Array], initial_state: jax.Array) -> dict[str, jax.Array]:
            o, final_state = recurrence.call(
                inputs,
                initial_state=initial_state,
                at=Tokens(None, segment_ids),
                implementation=implementation,
                chunk_size=chunk_size,
            )
            return {"o": o, "final_state": final_state}

        return with_gradients(outputs, inputs, initial_state)

    return run


def with_gradients(outputs: Callable[..., Any], *args: Any) -> Any:
    """The outputs and, for cotangents that are a fixed wave over each output, the gradients of all arguments."""
    values, pullback = jax.vjp(outputs, *args)
    return {"value": values, "gradient": pullback(jax.tree.map(wave, values))}
