"""A piece of a text, token by token: what each layer gives to them and makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Tokens
from plait.models.lm import LM
from plait.train.convert.sample import rows_of
from plait.train.inspection.flow import flow, mixing, rollout
from plait.train.inspection.looking import Kept, looking, num_heads
from plait.train.inspection.window import Window
from plait.train.probes.collect import padded_layers
from plait.train.probes.pictures import Pictures
from plait.train.run import Trained


class _Tokens(Pictures):
    """That of pictures, of a window, which keeps the sizes in the residual stream too. What comes before the window is one token, that looks at
    itself: memory grows with the length of what is read, not with its square."""

    def __init__(self, before: int):
        self.before = before

    def pick_rows(self, length: int) -> jax.Array:
        return jnp.arange(self.before, length, dtype=jnp.int32)

    def measure(self, looks):
        residual = jnp.abs(looks[0].residual[0].astype(jnp.float32))  # [T, D]
        largest = residual.max(-1)
        found = {**super().measure(looks), "median": jnp.median(residual)[None]}
        if self.before:
            largest = jnp.append(largest[: self.before].max(), largest[self.before :])
            if "attention" in found:
                found["attention"] = _together(found["attention"], self.before)
        return {**found, "largest": largest}


def _together(maps: jax.Array, before: int) -> jax.Array:
    """`[H, R + 1, R + 1]` of the rows `[H, R, T]` of the last R tokens: the first one is all before them, by absolute values."""
    given = jnp.concatenate([jnp.abs(maps[..., :before]).sum(-1, keepdims=True), maps[..., before:]], axis=-1)
    own = jnp.zeros_like(given[:, :1]).at[..., 0].set(1.0)
    return jnp.concatenate([jnp.where(jnp.isnan(given[:, :1]), jnp.nan, own), given], axis=1)


@dataclasses.dataclass(frozen=True)
class TokenByToken:
    """What is known of T tokens, of which the first one may be all that come before the others."""

    names: list[str]
    before: int
    """How many tokens the first one is, 0 where it is a token as the others."""
    losses: np.ndarray
    """`[T]`, nats, of each token after those before it; NaN where it is not predicted."""
    maps: np.ndarray
    """`[L, H, T, T]` attention, NaN where a head has none."""
    largest: np.ndarray
    """`[L, T]`: the largest |x| of the residual stream after each layer,"""
    median: np.ndarray
    """`[L]`: and the median over all tokens that were read, and channels."""

    @property
    def received(self) -> np.ndarray:
        """`[L, T]`: the mean share that a later token gives to each, over the heads that have attention; NaN for the last one."""
        later = np.tril(np.ones(self.maps.shape[-2:]), -1)
        shares = self.shares * later
        with np.errstate(invalid="ignore", divide="ignore"):
            given = shares.sum(-2) / later.sum(-2)  # [L, H, T]
            there = np.isfinite(self.maps).all((-1, -2))[..., None]
            return np.where(there, given, 0).sum(1) / there.sum(1)

    @property
    def shares(self) -> np.ndarray:
        """The attention as |A| over its row's sum, where that is above 1."""
        size = np.abs(self.maps)
        return size / np.maximum(size.sum(-1, keepdims=True), 1)

    @property
    def made_of(self) -> dict[str, np.ndarray]:
        """Of what share each token is part of the last one, by rollout and by flow; none where the first layer has no attention."""
        mixed = mixing(self.shares)
        return {"rollout": rollout(mixed), "flow": flow(mixed)} if len(mixed) else {}

    def to_json(self, heads: tuple[tuple[int, int], ...]) -> dict[str, Any]:
        """All of it, of the maps those of some heads."""
        numbers = {"loss": self.losses, "received": self.received, "largest": self.largest, "median": self.median, **self.made_of}
        maps = {f"{layer}.{head}": self.maps[layer, head].tolist() for layer, head in heads}
        told = {"tokens": self.names, "before": self.before}
        return {**told, **{name: value.tolist() for name, value in numbers.items()}, "attention": maps}


def token_by_token(trained: Trained, window: Window, names: list[str]) -> Callable[[Kept], TokenByToken]:
    """What makes it for the model with some heads kept; `names` are of the tokens that are shown."""
    ids, before, heads = window.ids, window.before, max(num_heads(trained.program.config.model))
    _, rows = rows_of(trained.program.config, trained.program.mesh, 1)
    places = np.arange(max(before, 1), len(ids))
    names, size = ([window.name] if before else []) + names, len(ids) - before + (before > 0)

    def losses(model: LM, hidden: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(model.logits(hidden[:1, places - 1])[0].astype(jnp.float32))
        return -jnp.take_along_axis(scores, jnp.asarray(ids[places])[:, None], axis=-1)[:, 0]

    look, at = looking(trained, _Tokens(before), losses), Tokens(jnp.asarray(np.tile(ids, (rows, 1)), jnp.int32))

    def of(kept: Kept) -> TokenByToken:
        told, layers = jax.device_get(look(at, kept))
        maps = padded_layers([layer.get("attention") for layer in layers], (heads, size, size))
        sizes = [np.stack([layer[name] for layer in layers]) for name in ("largest", "median")]
        return TokenByToken(names, before, np.append(np.nan, told), maps, sizes[0], sizes[1][:, 0])

    return of
