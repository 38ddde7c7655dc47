"""The first tokens of a text, one by one: what each layer gives to them and makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Tokens
from plait.train.convert.sample import rows_of
from plait.train.inspection.flow import flow, mixing, rollout
from plait.train.inspection.looking import Kept, looking, num_heads
from plait.train.probes.collect import padded_layers
from plait.train.probes.pictures import Pictures
from plait.train.run import Trained


class _Tokens(Pictures):
    """That of pictures, which keeps the sizes in the residual stream too."""

    def measure(self, looks):
        residual = jnp.abs(looks[0].residual[0].astype(jnp.float32))  # [T, D]
        return {**super().measure(looks), "largest": residual.max(-1), "median": jnp.median(residual)[None]}


@dataclasses.dataclass(frozen=True)
class TokenByToken:
    """What is known of T tokens."""

    names: list[str]
    losses: np.ndarray
    """`[T]`, nats, of each token after those before it; NaN where it is not predicted."""
    maps: np.ndarray
    """`[L, H, T, T]` attention, NaN where a head has none."""
    largest: np.ndarray
    """`[L, T]`: the largest |x| of the residual stream after each layer,"""
    median: np.ndarray
    """`[L]`: and the median over tokens and channels."""

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
        return {"tokens": self.names, **{name: value.tolist() for name, value in numbers.items()}, "attention": maps}


def token_by_token(trained: Trained, ids: np.ndarray, names: list[str]) -> Callable[[Kept, np.ndarray], TokenByToken]:
    """What makes it for the model with some heads kept, and the losses of the tokens."""
    size, heads = len(ids), max(num_heads(trained.program.config.model))
    _, rows = rows_of(trained.program.config, trained.program.mesh, 1)
    look, at = looking(trained, _Tokens()), Tokens(jnp.asarray(np.tile(ids, (rows, 1)), jnp.int32))

    def of(kept: Kept, losses: np.ndarray) -> TokenByToken:
        _, layers = look(at, kept)
        host: list[dict[str, np.ndarray]] = jax.tree.map(np.asarray, layers)
        maps = padded_layers([layer.get("attention") for layer in host], (heads, size, size))
        sizes = [np.stack([layer[name] for layer in host]) for name in ("largest", "median")]
        return TokenByToken(names, losses, maps, sizes[0], sizes[1][:, 0])

    return of
