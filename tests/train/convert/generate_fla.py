"""Writes `golden/fla_NAME/`: small models of flash-linear-attention, with logits and greedy tokens. Needs the extra `oracle`, and
flash-linear-attention and fla-core 0.6.0 (`pip install --no-deps`).

    python tests/train/convert/generate_fla.py [NAME ...]

The models are fla's own, with its layers' code and parameters. Its kernels need Triton and a GPU, so here what a kernel computes is fla's
naive reference of the same, or plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from unittest.mock import MagicMock

import torch
import torch._inductor.compile_fx  # asks for triton, before there seems to be one
from torch.nn import functional as F

from plait.tests.train.convert.generate import VOCAB, write

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
}
ATTENTION = {"layers": [1, 3], "num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "window_size": 7, "rope_theta": 500.0}
WHOLE = {"layers": [2], "num_heads": 3, "num_kv_heads": 3, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}
RANKS = {"head_dim": 6, "decay_low_rank_dim": 5, "gate_low_rank_dim": 7, "a_low_rank_dim": 4, "v_low_rank_dim": 3}
MODELS = {
    "gla": ("GLA", {**BASE, "attn": ATTENTION}),
    "delta_net": (
        "DeltaNet",
        {**BASE, "use_gate": True, "allow_neg_eigval": True, "attn": ATTENTION, "tie_word_embeddings": True},
    ),
    "delta_net_plain": ("DeltaNet", {**BASE, "num_hidden_layers": 2, "expand_k": 0.5, "expand_v": 0.5, "use_short_conv": False}),
    "gated_deltanet": (
        "GatedDeltaNet",
        {**BASE, "head_dim": 4, "num_v_heads": 8, "expand_v": 1.5, "allow_neg_eigval": True, "attn": [ATTENTION, WHOLE]},
    ),
    "gated_deltanet_plain": ("GatedDeltaNet", {**BASE, "num_hidden_layers": 2, "head_dim": 5, "conv_size": 3, "use_gate": False}),
    "retnet": ("RetNet", {**BASE, "attn": ATTENTION}),
    "kda": ("KDA", {**BASE, "head_dim": 5, "attn": ATTENTION}),
    "gated_deltaproduct": (
        "GatedDeltaProduct",
        {**BASE, "head_dim": 4, "expand_v": 1.5, "num_householder": 3, "attn": ATTENTION}
        | {"allow_neg_eigval": True, "use_forget_gate": True},
    ),
    "gated_deltaproduct_plain": (
        "GatedDeltaProduct",
        {**BASE, "num_hidden_layers": 2, "head_dim": 5, "num_householder": 2, "use_output_gate": False, "use_short_conv": False},
    ),
    "hgrn2": ("HGRN2", {**BASE, "expand_ratio": 6, "attn": ATTENTION}),
    "hgrn2_plain": (
        "HGRN2",
        {**BASE, "num_hidden_layers": 2, "num_heads": 3, "expand_ratio": 8, "conv_size": 3}
        | {"use_lower_bound": False, "use_short_conv": True, "tie_word_embeddings": True},
    ),
    "rwkv7": ("RWKV7", {**BASE, **RANKS, "num_hidden_layers": 4}),
    "rwkv7_plain": (
        "RWKV7",
        {**BASE, **RANKS, "num_hidden_layers": 2, "head_dim": 8, "num_heads": 3, "intermediate_size": None, "hidden_ratio": 2}
        | {"norm_first": False, "fuse_norm": False, "tie_word_embeddings": True},
    ),
    "kda_bounded": ("KDA", {**BASE, "num_hidden_layers": 2, "head_dim": 5, "safe_gate": True, "lower_bound": -4.0}),
}


class Kernel:
    """What a kernel is where there is no Triton: never called."""

    __name__ = "kernel"
    arg_names = ()
    user_defined_pre_hook = user_defined_post_hook = reset_to_zero = restore_value = None

    def __init__(self, *_, **__):
        self.fn = self


class NoTriton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets fla be imported."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "triton" else None

    def create_module(self, spec):
        module = MagicMock(__name__=spec.name, __path__=[], __spec__=spec, __version__="3.3.0", Autotuner=Kernel)
        module.jit = module.gluon.jit = lambda function=None, **_: Kernel() if function else lambda _: Kernel()
        module.heuristics = module.autotune = lambda *_, **__: lambda function: function
        module.runtime.driver.active.get_current_target.side_effect = RuntimeError
        return module

    def exec_module(self, module):
        pass


def rms_norm(self, x, residual=None, prenorm=False):
    x = x if residual is None else x + residual
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
    return (y, x) if prenorm else y


def layer_norm(self, x, residual=None, prenorm=False):
    x = x if residual is None else x + residual
    y = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
    return (y, x) if prenorm else y


def group_norm(self, x):
    return F.group_norm(x.flatten(0, -2), self.num_groups, self.weight, self.bias, self.eps).view_as(x)


def rms_norm_linear(x, norm_weight, norm_bias, weight, bias, eps=1e-5):
    return F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, eps), weight, bias)


def rms_norm_gated(self, x, gate):
    return rms_norm(self, x) * (gate.sigmoid() if self.activation == "sigmoid" else F.silu(gate))


def causal_conv1d(x, weight, activation, **_):
    y = F.conv1d(x.transpose(1, 2), weight[:, None], padding=weight.shape[-1] - 1, groups=len(weight))[..., : x.shape[1]]
    return (F.silu(y) if activation else y).transpose(1, 2), None


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def attention(q, k, v, causal, window_size):
    """As `flash_attn_func`."""
    k, v = (a.repeat_interleave(q.shape[2] // k.shape[2], 2) for a in (k, v))
    age = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None]
    seen = (age >= 0) & ((age <= window_size[0]) | (window_size[0] < 0))
    return F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), attn_mask=seen).transpose(1, 2)


def by_heads(op):
    """An op of `[B, H, T, D]` on `[B, T, H, D]`."""

    def apply(*arrays):
        found = op(*(a.transpose(1, 2) for a in arrays))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2), None

    return apply


def install() -> None:
    """Puts the references where fla's layers call kernels."""
    sys.meta_path.insert(0, NoTriton())
    from fla import modules
    from fla.layers import attn, delta_net, gated_deltanet, gated_deltaproduct, gla, hgrn2, kda, multiscale_retention, rwkv7
    from fla.models.rwkv7 import modeling_rwkv7
    from fla.modules import mlp
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda
    from fla.ops.retention.naive import naive_retention
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref

    def rotary(self, q, k, **_):
        angle = torch.arange(q.shape[1]).float()[:, None, None] * self.inv_freq
        turn = lambda a, b: torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
        return turn(*q.chunk(2, -1)), turn(*k.chunk(2, -1))

    def conv(self, x, **_):
        return causal_conv1d(x, self.weight[:, 0], self.activation)

    def delta_rule(q, k, v, beta, **_):
        return by_heads(delta_rule_recurrence)(unit(q), unit(k), v, beta)

    def gated_delta_rule(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, **_):
        q, k = (unit(a).repeat_interleave(v.shape[2] // q.shape[2], 2) for a in (q, k))
        g = -A_log.exp() * F.softplus(g + dt_bias)
        return naive_recurrent_gated_delta_rule(q, k, v, beta.sigmoid() * (1 + allow_neg_eigval), g)

    def delta_product(q, k, v, g, beta, **_):
        g = torch.zeros_like(beta) if g is None else g
        return naive_recurrent_gated_delta_rule(unit(q), unit(k), v, beta, g)

    def kimi_delta_rule(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, lower_bound, **_):
        gate = naive_kda_gate if lower_bound is None else functools.partial(naive_kda_lowerbound_gate, lower_bound=lower_bound)
        return naive_recurrent_kda(unit(q), unit(k), v, gate(g, A_log, dt_bias), beta.sigmoid() * (1 + allow_neg_eigval))

    def token_shift(x, *_, **__):
        return F.pad(x, (0, 0, 1, -1)) - x, None

    def rwkv(r, w, k, v, kk, a, scale, **_):
        return by_heads(dplr_recurrence)(r * scale * r.shape[-1] ** 0.5, k, v, -kk, kk * a, w)

    modules.RMSNorm.forward, modules.FusedRMSNormGated.forward = rms_norm, rms_norm_gated
    modules.RotaryEmbedding.forward, modules.ShortConvolution.forward = rotary, conv
    mlp.swiglu_linear = lambda gate, up, weight, bias: F.linear(F.silu(gate) * up, weight, bias)
    attn.flash_attn_func, gated_deltanet.causal_conv1d = attention, causal_conv1d
    modules.LayerNorm.forward, modules.GroupNorm.forward = layer_norm, group_norm
    gla.fused_recurrent_gla = hgrn2.fused_recurrent_gla = lambda q, k, v, gk, **_: naive_recurrent_gla(q, k, v, gk)
    hgrn2.swish, hgrn2.rms_norm_linear = F.silu, rms_norm_linear
    rwkv7.token_shift = modeling_rwkv7.token_shift = token_shift
    rwkv7.l2_norm, rwkv7.fused_mul_recurrent_rwkv7 = unit, rwkv
    rwkv7.fused_addcmul_rwkv7, rwkv7.fused_k_rwkv7 = torch_addcmul_rwkv7, k_update_ref
    rwkv7.gate_output_correction = gate_output_correction_ref
    modeling_rwkv7.ACT2FN = {"sqrelu": lambda x: F.relu(x).square()}
    multiscale_retention.fused_recurrent_retention = lambda q, k, v, **_: by_heads(naive_retention)(q, k, v)
    delta_net.fused_recurrent_delta_rule = delta_rule
    gated_deltanet.fused_recurrent_gated_delta_rule = gated_delta_rule
    gated_deltaproduct.fused_recurrent_gated_delta_rule = delta_product
    kda.fused_recurrent_kda = kimi_delta_rule


def generate(name: str) -> None:
    """Writes one folder."""
    kind, options = MODELS[name]
    models = importlib.import_module("fla.models")
    torch.manual_seed(0)
    config = getattr(models, f"{kind}Config")(**options)
    write(f"fla_{name}", getattr(models, f"{kind}ForCausalLM")(config).eval())


if __name__ == "__main__":
    install()
    for wanted in sys.argv[1:] or MODELS:
        generate(wanted)
