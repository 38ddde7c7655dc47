"""Golden outputs and gradients of recurrent layers: `python tests/models/golden/generate_recur.py` writes the .npz files beside it.

The layers are those of `transformers` and of flash-linear-attention (fla). fla's need a GPU for their kernels: here each kernel is fla's
own naive reference, and norms, convolutions and rotation are PyTorch's. Needs torch, transformers, einops and fla (see the `oracle` extra).
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from plait.tests.models.golden.generate import WIDTH, Arrays, _hidden, _random

LAYERS = 3


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of fla that are made of GPU kernels: found, and without anything that runs."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(("fla.ops", "fla.modules", "fla.models", "fla.utils")):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _missing  # type: ignore[method-assign]
        return module

    def exec_module(self, module):
        pass


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return (lambda function: function) if name == "tensor_cache" else name


@functools.cache
def _root() -> Path:
    return Path(next(iter(importlib.util.find_spec("fla").submodule_search_locations)))


@contextmanager
def _fla_layer(name: str) -> Iterator[types.ModuleType]:
    """The module of an fla layer, with nothing of fla left behind."""
    root = _root()
    before, finder = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "fla"}, _Absent()
    try:
        for package in ("fla", "fla.layers"):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.meta_path.insert(0, finder)
        yield importlib.import_module(f"fla.layers.{name}")
    finally:
        sys.meta_path.remove(finder)
        for found in [n for n in sys.modules if n.split(".")[0] == "fla"]:
            del sys.modules[found]
        sys.modules.update(before)


def _naive(folder: str, function: str) -> Callable:
    """A naive reference of fla."""
    spec = importlib.util.spec_from_file_location(f"naive_{folder}", _root() / "ops" / folder / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _modules() -> dict[str, Any]:
    """PyTorch's forms of the modules that fla's layers are made of."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class RMSNorm(nn.Module):
        def __init__(self, hidden_size, eps=1e-5, activation="swish", **_):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(hidden_size)), None
            self.eps, self.act = eps, {"swish": F.silu, "sigmoid": F.sigmoid}[activation]

        def forward(self, x, gate=None):
            y = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
            return y if gate is None else y * self.act(gate)

    class ShortConvolution(nn.Module):
        def __init__(self, hidden_size, kernel_size, activation=None, **_):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(hidden_size, 1, kernel_size))
            self.act = {"silu": F.silu, None: lambda y: y}[activation]

        def forward(self, x, **_):
            taps = self.weight.shape[-1]
            y = F.conv1d(x.mT, self.weight, padding=taps - 1, groups=self.weight.shape[0])[..., : x.shape[1]]
            return self.act(y.mT), None

    class RotaryEmbedding(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.dim = dim

        def forward(self, q, k, **_):
            angle = torch.arange(q.shape[1])[:, None, None] * 1e4 ** (-torch.arange(0, self.dim, 2) / self.dim)
            turn = lambda a, b: torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
            return turn(*q.chunk(2, -1)), turn(*k.chunk(2, -1))

    rms = lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    return {
        "RMSNorm": RMSNorm,
        "FusedRMSNormGated": RMSNorm,
        "ShortConvolution": ShortConvolution,
        "RotaryEmbedding": RotaryEmbedding,
        "ACT2FN": {"swish": F.silu},
        "swish": F.silu,
        "rms_norm_linear": lambda x, norm, _, weight, bias: F.linear(rms(x, norm), weight, bias),
        "rms_norm_swish_gate_linear": lambda x, g, norm, _, weight, bias: F.linear(rms(x, norm) * F.silu(g), weight, bias),
    }


def _run(layer, x: np.ndarray, seed: int, **options) -> Arrays:
    """Output of a layer, and the gradient in its input of `output . cotangent`."""
    import torch

    weights = _random(layer, seed)
    cotangent = np.random.RandomState(seed + 2).normal(size=x.shape).astype(np.float32)
    x_ = torch.tensor(x, requires_grad=True)
    y = layer(x_, **options)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.tensor(cotangent)).sum().backward()
    return {**weights, "x": x, "output": y.detach().numpy(), "cotangent": cotangent, "gradient": x_.grad.numpy()}


def _fla(name: str, layer: str, kernel: str, run: Callable, seed: int, options: dict, **call) -> Arrays:
    with _fla_layer(name) as module:
        vars(module).update(_modules())
        for form in ("chunk", "fused_recurrent"):
            setattr(module, f"{form}_{kernel}", run)
        return _run(getattr(module, layer)(hidden_size=WIDTH, layer_idx=1, **options), _hidden(seed), seed, **call)


def _l2(x):
    return x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt()


def _on_gla(q, k, v, **gates):
    gate = next(gates[name] for name in ("gk", "g") if gates.get(name) is not None)
    return _naive("gla", "naive_recurrent_gla")(q, k, v, gate)


def gla(seed: int = 0) -> Arrays:
    """Gated linear attention."""
    return _fla("gla", "GatedLinearAttention", "gla", _on_gla, seed, {"num_heads": 2, "gate_low_rank_dim": 3})


def retnet(seed: int = 0) -> Arrays:
    """Multi-scale retention."""
    retention = _naive("retention", "naive_retention")
    run = lambda q, k, v, **_: (retention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2), None)
    return _fla("multiscale_retention", "MultiScaleRetention", "retention", run, seed, {"num_heads": 2})


def hgrn2(seed: int = 0) -> Arrays:
    """The second of three layers of HGRN2, with its bound out of those of all."""
    import torch

    bounds = torch.tensor(np.random.RandomState(seed + 3).normal(size=(LAYERS, WIDTH)), dtype=torch.float32).softmax(0)
    bound = (bounds.cumsum(0) - bounds[0])[1]
    found = _fla("hgrn2", "HGRN2Attention", "gla", _on_gla, seed, {"expand_ratio": 8}, lower_bound=bound)
    return {**found, "lower_bound": bound.numpy()}


def lightnet(seed: int = 0) -> Arrays:
    """LightNet, its decay written out and run as GLA."""
    import torch

    def run(q, k, v, **_):
        z = k.logcumsumexp(1)
        before = torch.cat([z[:, :1], z[:, :-1]], dim=1)
        return _on_gla(q, (k - z).exp(), v, g=before - z)[0], (None, None)

    return _fla("lightnet", "LightNetAttention", "lightnet", run, seed, {"expand_ratio": 8, "gate_low_rank_dim": 5})


def _deltanet(seed: int, **options) -> Arrays:
    delta = _naive("delta_rule", "delta_rule_recurrence")

    def run(q, k, v, beta, **_):
        o, state = delta(*(y.transpose(1, 2) for y in (_l2(q), _l2(k), v, beta)))
        return o.transpose(1, 2), state

    return _fla("delta_net", "DeltaNet", "delta_rule", run, seed, {"num_heads": 2, **options})


def deltanet(seed: int = 0) -> Arrays:
    """DeltaNet as published."""
    return _deltanet(seed)


def deltanet_gated(seed: int = 0) -> Arrays:
    """The same with an output gate and writes of up to 2."""
    return _deltanet(seed, use_gate=True, allow_neg_eigval=True)


def gated_deltaproduct(seed: int = 0) -> Arrays:
    """Gated DeltaProduct of three steps a token."""
    product = _naive("gated_delta_product", "naive_recurrent_gated_delta_product")
    scale = 4**-0.5

    def run(q, k, v, g, beta, num_householder, **_):
        return product(_l2(q), _l2(k), v, g, beta, scale, num_householder=num_householder)

    options = {"num_heads": 2, "num_v_heads": 4, "head_dim": 4, "expand_v": 1.5, "num_householder": 3}
    return _fla("gated_deltaproduct", "GatedDeltaProduct", "gated_delta_product", run, seed, options)


def kda_bounded(seed: int = 0) -> Arrays:
    """Kimi delta attention with the bounded gate."""
    kda = _naive("kda", "naive_recurrent_kda")

    def run(q, k, v, g, beta, A_log, dt_bias, lower_bound, **_):
        gate = lower_bound * (A_log.exp()[:, None] * (g + dt_bias.view(g.shape[-2:]))).sigmoid()
        return kda(_l2(q), _l2(k), v, gate, beta.sigmoid())

    options = {"num_heads": 2, "head_dim": 8, "safe_gate": True, "lower_bound": -5.0}
    return _fla("kda", "KimiDeltaAttention", "kda", run, seed, options)


def kimi_linear(seed: int = 0) -> Arrays:
    """Kimi delta attention of Kimi Linear."""
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    config = kimi.KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_head_dim=4,
        linear_num_heads=3,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
    )
    return _run(kimi.KimiLinearDeltaAttention(config, 0), _hidden(seed), seed)


def minimax(seed: int = 0) -> Arrays:
    """Lightning attention of MiniMax, in the second of three layers."""
    from transformers.models.minimax import modeling_minimax

    config = modeling_minimax.MiniMaxConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * LAYERS,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=6,
        block_size=8,
    )
    layer = modeling_minimax.MiniMaxLightningAttention(config, 1)
    return _run(layer, _hidden(seed), seed, position_embeddings=None, attention_mask=None)


def olmo_hybrid(seed: int = 0) -> Arrays:
    """Gated DeltaNet of OLMo-hybrid: its own gate projection, and writes of up to 2."""
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid

    config = modeling_olmo_hybrid.OlmoHybridConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=4,
    )
    return _run(modeling_olmo_hybrid.OlmoHybridGatedDeltaNet(config, 0), _hidden(seed), seed)


_ALL = (
    gla,
    retnet,
    hgrn2,
    lightnet,
    deltanet,
    deltanet_gated,
    gated_deltaproduct,
    kda_bounded,
    kimi_linear,
    minimax,
    olmo_hybrid,
)
ORACLES: dict[str, Callable[..., Arrays]] = {f.__name__: f for f in _ALL}


if __name__ == "__main__":
    for name, oracle in ORACLES.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **oracle())
