"""The home of models that no other family has: this project's own config and names, as safetensors."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

import jax.numpy as jnp

from plait.configs import codec
from plait.models.config import LMConfig
from plait.models.hf.base import Family, Line, Unfit, register
from plait.models.hf.places import Place
from plait.models.hf.transforms import Same
from plait.models.lm import learned_shapes


@register("plait", source="docs/conversion.md")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plait(Family):
    """`config.json` has the model's config under `model`, as a run folder's has; tensors have the dotted paths of parameters, repeated layers
    being rows of one."""

    architecture = "PlaitForCausalLM"  # which transformers has not
    mixers = ()  # all: named by none
    base = ""
    head = "head.kernel"
    around = Fixed({"embedding": "embedding"})

    def model(self, values):
        return _plain(codec.decode(LMConfig, values("model", dict), "model"))

    def values(self, model):
        return {"model": codec.encode(_plain(model))}

    def layer(self, model, index, layer):
        raise NotImplementedError("tensors are not by layer here")

    def table(self, model):
        halved = learned_shapes(dataclasses.replace(model, param_dtype="bfloat16"))
        return [Line((path,), (Place(path),), Same(), like.dtype == jnp.float32) for path, like in halved.items()]


def _plain(model: LMConfig) -> LMConfig:
    """`model`. Raises Unfit where its weights are more than one array a matrix."""
    for name, given in {"sigma_reparam": model.sigma_reparam, "lora.rank": model.lora.rank}.items():
        if given is not None:
            raise Unfit(f"model.{name}={given!r} is not of plain weights; fold it first, as launch.py convert export does")
    return model
