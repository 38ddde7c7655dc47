"""What a token costs in decoding, by how many stand before it."""

from __future__ import annotations

import dataclasses

from plait.kernels.chips import Chip
from plait.models.config import LMConfig
from plait.models.lm import num_params

CONTEXTS = (4096, 32 * 1024, 128 * 1024, 1 << 20)
"""Tokens before the one that is decoded."""
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A token of one sequence, on one device."""

    context: int
    """Tokens before it."""
    state: int
    """Bytes of caches and states of all layers."""
    growing: int
    """Those of them that another token adds to: caches."""
    flops: float
    """Operations, 2 per multiply-add."""
    weights: int
    """Bytes of the parameters that it reads."""

    def seconds(self, chip: Chip) -> float:
        """The least time on a chip, of a batch of one: operations, or the reading of weights and state."""
        return max(self.flops / chip.flops, (self.weights + self.state) / chip.memory_bandwidth)


def decoding(model: LMConfig, contexts: tuple[int, ...] = CONTEXTS) -> list[Decoding]:
    """A token after each of `contexts`, of a model with a settled vocabulary, caches and weights in its compute dtype.

    Every parameter is read but the embedding's other rows: of a mixture of experts all experts, as where many sequences are decoded.
    """
    mixers = model.layer_mixers
    head = 2.0 * model.d_model * (model.vocab_size or 0)
    products = sum(mixer.product_flops(model.d_model) for mixer in mixers) + head
    products += sum(one.flops(model.d_model) for one in model.layer_channel_mixers)
    lookup = 0 if model.tie_embeddings else model.d_model * (model.vocab_size or 0)
    weights = (num_params(model) - lookup) * _BYTES[model.compute_dtype]
    channels = sum(one.state_bytes(model.d_model, model.compute_dtype) for one in model.layer_channel_mixers)
    found = []
    for context in contexts:
        sizes = [[mixer.state_bytes(model.d_model, n, model.compute_dtype) for n in (context, 2 * context)] for mixer in mixers]
        found.append(
            Decoding(
                context=context,
                state=sum(now for now, _ in sizes) + channels,
                growing=sum(now for now, later in sizes if later > now),
                flops=products + sum(mixer.decode_flops(model.d_model, context) for mixer in mixers),
                weights=weights,
            )
        )
    return found
