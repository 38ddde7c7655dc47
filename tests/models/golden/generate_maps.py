"""Golden outputs and input gradients of linear attention by features and of Parallax: `python generate_maps.py CLONES` writes .npz files.

Needs torch and the references of fla (see the `oracle` extra); CLONES is a folder with the authors' repositories HazyResearch/based,
HazyResearch/lolcats, qhfan/MALA, qhfan/RALA, LeapLabTHU/InLine, thuml/Flowformer and ZacharyMeng/NaLaFormer, each in a folder of its
name. A file holds inputs, random weights under their names there, the output, a cotangent and what it gives for the inputs; nothing else
of others is kept.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, WIDTH, HEADS = 2, 21, 16, 2
INLINE_LENGTH = 17  # a class token and a square
THETA = 100.0
Arrays = dict[str, np.ndarray]


def _load(path: Path, name: str) -> Any:
    """The module of a file, whose own imports may be missing: they get stand-ins."""
    import torch

    class Anything(torch.nn.Module):
        def __init__(self, *_, **__):
            super().__init__()

    class StandIn(types.ModuleType):
        def __getattr__(self, attribute: str) -> Any:
            return Anything

    stand_ins = (
        *("timm", "timm.models", "timm.models.layers", "timm.models.registry", "timm.models.vision_transformer"),
        *("timm.models._registry", "timm.layers", "timm.data", "timm.models.helpers", "fvcore", "fvcore.nn"),
        *(
            "lolcats",
            "lolcats.linear_attention",
            "based",
            "based.generation",
            "fla.modules.activations",
            "fla.modules.layernorm",
            "fla.utils",
        ),
    )
    before = {module: sys.modules.get(module) for module in stand_ins}
    sys.modules.update({module: StandIn(module) for module in stand_ins})
    sys.modules["fla.utils"].checkpoint = lambda function: function
    layer_norm = lambda x, weight, bias: torch.nn.functional.layer_norm(x, weight.shape, weight, bias)
    sys.modules["fla.modules.layernorm"].layer_norm = layer_norm
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for known, old in before.items():
            sys.modules.pop(known) if old is None else sys.modules.update({known: old})
    return module


def _fla(path: str) -> Any:
    spec = importlib.util.find_spec("fla")
    return _load(Path(spec.submodule_search_locations[0]) / path, path.replace("/", "_").removesuffix(".py"))


def _random(module: Any, seed: int) -> Arrays:
    """Gives every parameter a random value away from its initial one; returns them."""
    import torch

    random = np.random.RandomState(seed)
    weights = {}
    for name, parameter in module.named_parameters():
        spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        value = random.normal(size=parameter.shape) * spread + (1.0 if name in ("norm.weight", "ln.weight", "gamma") else 0.0)
        parameter.data = torch.tensor(value, dtype=torch.float32)
        weights[f"weights/{name}"] = value.astype(np.float32)
    return weights


def _run(module: Any, seed: int, forward: Callable[[Any], Any], length: int = LENGTH) -> Arrays:
    """Input, output, cotangent and input gradient of `forward` of `[B, T, D]`, and the module's weights."""
    import torch

    random = np.random.RandomState(seed + 1)
    x, cotangent = (random.normal(size=(BATCH, length, WIDTH)).astype(np.float32) for _ in range(2))
    weights = _random(module.eval(), seed)
    inputs = torch.tensor(x, requires_grad=True)
    y = forward(inputs)
    y.backward(torch.tensor(cotangent))
    return {**weights, "x": x, "output": y.detach().numpy(), "cotangent": cotangent, "dx": inputs.grad.numpy()}


def _linear(feature_map: str, normalize: bool, seed: int = 2) -> Arrays:
    """fla's LinearAttention, its kernel's naive form in its place."""
    import torch

    maps, op = _fla("modules/feature_map.py"), _fla("ops/linear_attn/naive.py").naive_recurrent_linear_attn
    dim = WIDTH // HEADS
    make = {
        "elu": lambda: lambda x: torch.nn.functional.elu(x) + 1,
        "relu": lambda: maps.T2RFeatureMap(dim),
        "dpfp": lambda: maps.DPFPFeatureMap(dim),
        "rebased": lambda: maps.RebasedFeatureMap(dim),
        "hadamard": lambda: maps.HadamardFeatureMap(dim),
        "hedgehog": lambda: maps.HedgehogFeatureMap(dim),
    }[feature_map]
    layer = torch.nn.Module()
    for name in "qkvo":
        setattr(layer, f"{name}_proj", torch.nn.Linear(WIDTH, WIDTH, bias=False))
    layer.feature_map_q, layer.feature_map_k = make(), make()
    layer.norm = torch.nn.Identity() if normalize else torch.nn.RMSNorm(dim, eps=1e-5)

    def forward(x: Any) -> Any:
        heads = lambda y: y.reshape(BATCH, LENGTH, HEADS, dim)
        q, k = layer.feature_map_q(heads(layer.q_proj(x))), layer.feature_map_k(heads(layer.k_proj(x)))
        o, _ = op(q, k, heads(layer.v_proj(x)), normalize=normalize)
        return layer.o_proj(layer.norm(o).reshape(x.shape))

    return _run(layer, seed, forward)


def parallax(seed: int = 0) -> Arrays:
    """fla's Parallax with grouped keys, without positions, its kernel's naive form in its place."""
    import torch

    op, dim = _fla("ops/parallax/naive.py").naive_parallax, WIDTH // 4
    layer = torch.nn.Module()
    for name, width in (("q", WIDTH), ("r", WIDTH), ("k", 2 * dim), ("v", 2 * dim), ("o", WIDTH)):
        setattr(layer, f"{name}_proj", torch.nn.Linear(WIDTH, width, bias=False))

    def forward(x: Any) -> Any:
        heads = lambda y: y.reshape(BATCH, LENGTH, -1, dim)
        o = op(*(heads(getattr(layer, f"{name}_proj")(x)) for name in "qrkv"))
        return layer.o_proj(o.reshape(x.shape))

    return _run(layer, seed, forward)


FLA: dict[str, Callable[..., Arrays]] = {
    **{
        f"linear_{name}": functools.partial(_linear, name, normalize)
        for name, normalize in (("elu", True), ("relu", True), ("dpfp", True), ("rebased", True), ("hadamard", False))
    },
    "hedgehog_joint": functools.partial(_linear, "hedgehog", True),
    "parallax": parallax,
}
"""References that can be installed."""


def based(clones: Path, seed: int = 0) -> Arrays:
    """The linear attention of the released models, its quadratic form, of 4 features."""
    mixers = _load(clones / "based/based/models/mixers/linear_attention.py", "based_linear_attention")
    layer = mixers.LinearAttention(WIDTH, feature_map=mixers.TaylorExp(4), feature_dim=4, num_heads=HEADS)
    return _run(layer, seed, layer)


def lolcats(clones: Path, seed: int = 0) -> Arrays:
    """The attention of LoLCATs with sliding windows, its quadratic form, of one key head and maps to 4 channels."""
    import torch

    dim, folder = WIDTH // HEADS, clones / "lolcats/src/model"
    maps = _load(folder / "feature_map.py", "lolcats_feature_map")
    op = _load(folder / "linear_attention/linear_window_attention_sw.py", "lolcats.window").hybrid_attention_quadratic
    layer = torch.nn.Module()
    for name, width in (("q", WIDTH), ("k", dim), ("v", dim), ("o", WIDTH)):
        setattr(layer, f"{name}_proj", torch.nn.Linear(WIDTH, width, bias=False))
    for name in "qk":
        mlp = maps.FeatureMapMLP(HEADS, dim, 4, torch.float32, "cpu")
        setattr(layer, f"feature_map_{name}", maps.FeatureMap("softmax_dim", mlp=mlp))
    layer.window_factors = torch.nn.Parameter(torch.zeros(1, HEADS, 1, 1))

    def forward(x: Any) -> Any:
        heads = lambda y: y.reshape(BATCH, LENGTH, -1, dim).transpose(1, 2)
        q, k, v = (heads(getattr(layer, f"{name}_proj")(x)) for name in "qkv")
        k, v = (y.repeat_interleave(HEADS, dim=1) for y in (k, v))
        features = layer.feature_map_q(q), layer.feature_map_k(k)
        o, _ = op(q, k, *features, v, torch.sigmoid(layer.window_factors), 1, window_size=5)
        return layer.o_proj(o.transpose(1, 2).reshape(x.shape))

    return _run(layer, seed, forward)


def base_conv(clones: Path, seed: int = 0) -> Arrays:
    """The gated convolution of the released models."""
    sys.modules.setdefault("flash_attn", types.ModuleType("flash_attn"))
    for name in ("flash_attn.utils", "flash_attn.utils.generation"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["flash_attn.utils.generation"].InferenceParams = object
    layer = _load(clones / "based/based/models/mixers/convolution.py", "based_convolution").BaseConv(WIDTH, LENGTH, expand_proj=4)
    return _run(layer, seed, layer)


def _on_line(layer: Any, seed: int) -> Arrays:
    """A layer of images, on an image of one column; its rotations are those of a sequence."""
    import torch

    angle = np.arange(LENGTH)[:, None] * np.repeat(THETA ** (-np.arange(WIDTH // HEADS // 2) / (WIDTH // HEADS // 2)), 2)[None]
    sin, cos = (torch.tensor(f(angle), dtype=torch.float32) for f in (np.sin, np.cos))
    return _run(layer, seed, lambda x: layer(x.transpose(1, 2)[..., None], sin, cos)[..., 0].transpose(1, 2))


def mala(clones: Path, seed: int = 0) -> Arrays:
    """The linear attention of MALA's classifiers."""
    return _on_line(_load(clones / "MALA/classfication_release/model.py", "mala_model").AddLinearAttention(WIDTH, HEADS), seed)


def rala(clones: Path, seed: int = 0) -> Arrays:
    """The linear attention of RALA's classifiers."""
    return _on_line(_load(clones / "RALA/classfication/RALA.py", "rala_model").GateLinearAttentionNoSilu(WIDTH, HEADS), seed)


def nalaformer(clones: Path, seed: int = 0) -> Arrays:
    """The linear attention of NaLaFormer."""
    return _on_line(_load(clones / "NaLaFormer/NaLaformer/NALA.py", "nala_model").NormAwareLinearAttn(WIDTH, HEADS), seed)


def inline_attention(clones: Path, seed: int = 0) -> Arrays:
    """InLine attention, whose residual, of images only, is turned off."""
    layer = _load(clones / "InLine/models/inline_deit.py", "inline_deit").InLineAttention(WIDTH, HEADS)

    def forward(x: Any) -> Any:
        for parameter in layer.residual[2].parameters():
            parameter.data.zero_()
        return layer(x)

    return _run(layer, seed, forward, INLINE_LENGTH)


def _flowformer(name: str, clones: Path, seed: int = 0) -> Arrays:
    layer = getattr(_load(clones / "Flowformer/Flow_Attention.py", "flow_attention"), name)(WIDTH, WIDTH, WIDTH, HEADS)
    return _run(layer, seed, lambda x: layer(x, x, x))


AUTHORS: dict[str, Callable[..., Arrays]] = {
    **{f.__name__: f for f in (based, lolcats, base_conv, mala, rala, nalaformer, inline_attention)},
    "flowformer": functools.partial(_flowformer, "Flow_Attention"),
    "flowformer_causal": functools.partial(_flowformer, "Flow_Attention_Causal"),
}
"""References in the authors' repositories."""


if __name__ == "__main__":
    found = {name: oracle() for name, oracle in FLA.items()}
    found |= {name: oracle(Path(sys.argv[1])) for name, oracle in AUTHORS.items()}
    for name, arrays in found.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **arrays)
