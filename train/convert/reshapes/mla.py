"""MHA or GQA to multi-head latent attention of low rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from plait.configs.domains import Channels, Counted
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.rotary import RotaryConfig
from plait.train.convert.reshapes.base import (
    Making,
    Reshape,
    Shapes,
    Subject,
    chosen,
    core,
    core_path,
    is_softmax,
    register,
    require_plain,
    with_core,
    with_mixers,
)
from plait.train.convert.weights import ConvertError

_READ = ("q.kernel", "k.kernel", "v.kernel")
_MADE = ("q.kernel", "kv_down.kernel", "k_rope.kernel", "k_up.kernel", "v_up.kernel")


@register("mla", source="TransMLA (2502.07864), RoRoPE; MHA2MLA (2502.14837), joint SVD")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLA(Reshape):
    """Keys and values of all heads from one latent, by a joint SVD of their kernels; the latent has no norm.

    MLA has one rotated key for all heads. For each frequency, the key heads are turned among each other, which rotary embedding does not
    see, so that the first of them has most of the kernels' square; it becomes that key, and the others lose their rotation (RoRoPE).
    Without rotary embedding, with one key head, or where key heads are multiples of each other, full rank is the same function. Keys are
    scaled to the values' norm before the SVD. TransMLA does both on activations of a text; here the kernels alone decide.
    """

    kv_rank: Channels = 512
    """Channels of the latent; with the rotated channels of a head, what decoding keeps of a token."""
    layers: tuple[Counted, ...] | None = None
    """Numbers of the layers, with commas; all with softmax attention by default."""

    def model(self, subject: Subject):
        model = subject.model
        found = {}
        for index in chosen(model, self.layers, is_softmax, "softmax attention"):
            mixer, name = model.layer_mixers[index], model.layers[index]
            softmax = core(mixer)
            assert isinstance(softmax, SoftmaxConfig)
            require_plain(model, softmax, name, "MLA", kept=("positions", "scale"))
            found[index] = with_core(mixer, self._latent(model.d_model, softmax, name))
        return with_mixers(model, found, "latent")

    def _latent(self, d_model: int, softmax: SoftmaxConfig, name: str) -> MLAConfig:
        positions = softmax.positions
        if positions is not None and not isinstance(positions, RotaryConfig):
            raise ConvertError(
                f"model.mixers.{name}.positions={positions.name!r} are none that MLA has; it has rotary ones or None"
            )
        heads, kv_heads = softmax.heads(d_model)
        if self.kv_rank > (most := min(d_model, 2 * kv_heads * softmax.head_dim)):
            raise ConvertError(
                f"kv_rank={self.kv_rank} must be at most {most}, the rank of keys and values of model.mixers.{name}; use {most} or less"
            )
        return MLAConfig(
            num_heads=heads,
            kv_rank=self.kv_rank,
            nope_head_dim=softmax.head_dim,
            rope_head_dim=turned_channels(softmax),
            v_head_dim=softmax.head_dim,
            positions=_of_turned(softmax),
            latent_norm=False,
        )

    def layer(self, old: MixerConfig, new: MixerConfig, before: Shapes, after: Shapes, index: int) -> Iterator[Making]:
        softmax, path = core(old), core_path(new)
        assert isinstance(softmax, SoftmaxConfig)
        heads, kv_heads = softmax.heads(before[path + "q.kernel"][0])
        make = lambda q, k, v: latent_kernels(softmax, self.kv_rank, heads, kv_heads, q, k, v)
        yield Making(tuple(path + name for name in _READ), tuple(path + name for name in _MADE), make)


def _of_turned(softmax: SoftmaxConfig) -> RotaryConfig | None:
    """The rotary embedding of a head that has the turned channels alone."""
    positions = softmax.positions
    if not isinstance(positions, RotaryConfig) or turned_channels(softmax) == softmax.head_dim:
        return positions  # type: ignore[return-value]
    return dataclasses.replace(positions, fraction=1.0)


def turned_channels(softmax: SoftmaxConfig) -> int:
    """Those of a head that have a rotated part, or all where none has."""
    positions = softmax.positions
    return positions.turned(softmax.head_dim) if isinstance(positions, RotaryConfig) else softmax.head_dim


def latent_kernels(
    softmax: SoftmaxConfig, rank: int, heads: int, kv_heads: int, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> list[np.ndarray]:
    """Kernels of MLA's queries, latent, shared key, and of keys and values from the latent, of those of softmax attention `[D, heads * K]`."""
    q, k, v = (x.astype(np.float64).reshape(len(x), -1, softmax.head_dim) for x in (q, k, v))
    turned, positions = turned_channels(softmax), softmax.positions
    mix = _shared(k[..., :turned], positions)  # [Hkv, turned]
    k_rope = np.einsum("dgc,gc->dc", k[..., :turned], mix)
    rest = k.copy()
    rest[..., :turned] -= mix * k_rope[:, None]

    scale = softmax.head_dim**-0.5 if softmax.scale is None else softmax.scale
    q = q * scale * (softmax.head_dim + turned) ** 0.5  # MLA's own scale taken out
    q_rope = q[..., :turned] * np.repeat(mix, heads // kv_heads, axis=0)
    if isinstance(positions, RotaryConfig):  # MLA multiplies all logits by what softmax attention multiplies the rotated part by
        q = np.concatenate([q[..., :turned], q[..., turned:] / positions.magnitude**2], axis=-1)

    norms = np.linalg.norm(rest), np.linalg.norm(v)
    balance = norms[1] / norms[0] if min(norms) > 0 else 1.0
    both = np.concatenate([balance * rest, v], axis=1)  # [D, 2 Hkv, K]
    left, values, right = np.linalg.svd(both.reshape(len(both), -1), full_matrices=False)
    root = np.sqrt(values[:rank])
    up = (root[:, None] * right[:rank]).reshape(rank, 2, kv_heads, -1)
    k_up, v_up = (np.repeat(x, heads // kv_heads, axis=1).reshape(rank, -1) for x in (up[:, 0] / balance, up[:, 1]))
    queries = np.concatenate([q, q_rope], axis=-1).reshape(len(q), -1)
    return [queries, left[:, :rank] * root, k_rope, k_up, v_up]


def _shared(k: np.ndarray, positions: object) -> np.ndarray:
    """How much of the shared key is in each key head, `[Hkv, R]`: the leading direction of each frequency's channels in kernels `[D, Hkv, R]`.

    Channels of a frequency are mixed alike, so that their rotation is the same before and after.
    """
    channels = k.shape[-1]
    pair = np.arange(channels)
    if isinstance(positions, RotaryConfig):
        pair = pair // 2 if positions.interleaved else pair % (channels // 2)
    gram = np.einsum("dgc,dhc->cgh", k, k)
    found = np.empty(k.shape[1:])
    for one in np.unique(pair):
        found[:, pair == one] = np.linalg.eigh(gram[pair == one].sum(0))[1][:, -1:]
    return found
