"""Golden outputs and gradients of layers that scan: `python tests/models/golden/generate_scan.py [MEGA]` writes the .npz files beside it.

The layers are those of `transformers`, of flash-linear-attention on its own naive references (see `generate_recur`), and of Mega, whose
repository (facebookresearch/mega) is read from the folder MEGA where one is named. A file holds inputs, random weights under their names
there, outputs and gradients; nothing else of another's code is kept.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

from plait.tests.models.golden.generate import BATCH, LENGTH, WIDTH, Arrays, _hidden

LAYERS, HEAD_DIM = 3, 8
MEGA = {"attention_dim": 6, "hidden": 20, "state_dim": 3, "chunk_size": 7}


def hgrn(seed: int = 0) -> Arrays:
    """The second of three layers of HGRN, with its bound out of those of all."""
    import torch
    import torch.nn.functional as F

    from plait.tests.models.golden.generate_recur import _fla_layer, _modules, _naive, _run

    bounds = torch.tensor(np.random.RandomState(seed + 3).normal(size=(LAYERS, WIDTH)), dtype=torch.float32).softmax(0)
    bound = (bounds.cumsum(0) - bounds[0])[1]
    naive = _naive("hgrn", "naive_recurrent_hgrn")
    with _fla_layer("hgrn") as module:
        vars(module).update(_modules(), swiglu=lambda x, y: F.silu(x) * y, chunk_hgrn=lambda x, g, **_: naive(x, g))
        layer = module.HGRNAttention(hidden_size=WIDTH, layer_idx=1)
        return {**_run(layer, _hidden(seed), seed, lower_bound=bound), "lower_bound": bound.numpy()}


def rwkv7(seed: int = 0) -> Arrays:
    """The second of three layers of RWKV-7, which takes the values of the first."""
    import torch

    from plait.tests.models.golden.generate_recur import _fla_layer, _naive, _run

    naive = _naive("generalized_delta_rule/dplr", "dplr_recurrence")

    def recurrence(r, w, k, v, a, b, **_):
        q, k, v, a, b, w = (y.transpose(1, 2) for y in (r * r.shape[-1] ** 0.5, k, v, a, b, w))
        o, state = naive(q, k, v, a, b, w)
        return o.transpose(1, 2), state

    def corrected(o, r, k, r_k, v, g):
        return (o + ((r * k * r_k).sum(-1, keepdim=True) * v).flatten(-2)) * g

    first = np.random.RandomState(seed + 3).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    with _fla_layer("rwkv7") as module:
        vars(module).update(
            token_shift=lambda x, *_, **__: (torch.nn.functional.pad(x, (0, 0, 1, -1)) - x, None),
            fused_addcmul_rwkv7=lambda x, delta, *mixes: tuple(x + delta * mix for mix in mixes),
            fused_k_rwkv7=lambda k, a, k_a: k * (1 + (a - 1) * k_a),
            chunk_rwkv7=recurrence,
            gate_output_correction=corrected,
        )
        ranks = {"decay_low_rank_dim": 3, "a_low_rank_dim": 4, "v_low_rank_dim": 5, "gate_low_rank_dim": 6}
        layer = module.RWKV7Attention(
            hidden_size=WIDTH, head_dim=HEAD_DIM, layer_idx=1, num_hidden_layers=LAYERS, norm_eps=1e-5, **ranks
        )
        layer.train()
        return {**_run(layer, _hidden(seed), seed, v_first=torch.tensor(first)), "first": first}


def rg_lru(seed: int = 0) -> Arrays:
    """The recurrent block of RecurrentGemma, in four blocks."""
    import torch
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as gemma

    from plait.tests.models.golden.generate_recur import _run

    config = gemma.RecurrentGemmaConfig(hidden_size=WIDTH, lru_width=24, num_attention_heads=4, num_hidden_layers=3)
    layer = gemma.RecurrentGemmaRecurrentBlock(config, 0).eval()
    positions = torch.arange(LENGTH)[None].expand(BATCH, -1)
    return _run(layer, _hidden(seed), seed, position_ids=positions, attention_mask=None, use_cache=False)


def lfm2_conv(seed: int = 0) -> Arrays:
    """The gated short convolution of LFM2, with biases."""
    from transformers.models.lfm2 import modeling_lfm2

    from plait.tests.models.golden.generate_recur import _run

    config = modeling_lfm2.Lfm2Config(
        hidden_size=WIDTH, num_hidden_layers=1, layer_types=["conv"], conv_L_cache=3, conv_bias=True, num_attention_heads=2
    )
    return _run(modeling_lfm2.Lfm2ShortConv(config, 0).eval(), _hidden(seed), seed)


MAMBA = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "state_size": 4,
    "time_step_rank": 3,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "use_associative_scan": False,
}


def mamba(seed: int = 0) -> Arrays:
    """The Mamba-1 layer."""
    from transformers.models.mamba import modeling_mamba

    from plait.tests.models.golden.generate_recur import _run

    return _run(modeling_mamba.MambaMixer(modeling_mamba.MambaConfig(**MAMBA), 0).eval(), _hidden(seed), seed)


def falcon_mamba(seed: int = 0) -> Arrays:
    """The same with its step, B and C normalised."""
    from transformers.models.falcon_mamba import modeling_falcon_mamba as falcon

    from plait.tests.models.golden.generate_recur import _run

    config = falcon.FalconMambaConfig(**MAMBA, mixer_rms_eps=1e-6)
    found = _run(falcon.FalconMambaMixer(config, 0, initialize_mixer_weights=False).eval(), _hidden(seed), seed)
    return {name: array for name, array in found.items() if "layernorm" not in name}


def _mega(root: Path, seed: int, **options) -> Arrays:
    """A cell of Mega without its norm, so that what it adds to its input is what a mixer gives."""
    import torch
    from torch import nn

    from plait.tests.models.golden.generate_recur import _run

    class Same(nn.Module):
        def __init__(self, *_, **__):
            super().__init__()

        def forward(self, x, **_):
            return x

    tree = ast.parse((root / "fairseq/utils.py").read_text("utf-8"))
    laplace = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "laplace")
    utils = {"torch": torch, "math": math}
    exec(compile(ast.Module([laplace], []), "utils.py", "exec"), utils)
    utils |= {"get_activation_fn": lambda activation: nn.functional.silu}
    utils |= {"softmax": lambda x, dim, onnx_trace: nn.functional.softmax(x, dim=dim)}
    stubs = {
        "fairseq": {},
        "fairseq.modules": {},
        "fairseq.utils": utils,
        "fairseq.incremental_decoding_utils": {"with_incremental_state": lambda cls: cls},
        "fairseq.modules.fairseq_dropout": {"FairseqDropout": Same, "FairseqFeatureDropout": Same},
        "fairseq.modules.sequence_norm": {"SequenceNorm": Same},
    }
    for name, members in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    sys.modules["fairseq"].utils = sys.modules["fairseq.utils"]
    for name in ("exponential_moving_average", "relative_positional_bias", "moving_average_gated_attention"):
        spec = importlib.util.spec_from_file_location(f"fairseq.modules.{name}", root / f"fairseq/modules/{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    chunk_size = options.get("chunk_size", -1)
    layer = module.MovingAverageGatedAttention(
        WIDTH, MEGA["attention_dim"], MEGA["hidden"], MEGA["state_dim"], max_positions=LENGTH, prenorm=False, **options
    )
    size = LENGTH if chunk_size < 0 else chunk_size
    visible = torch.ones(size, size).tril()
    mask = visible if options.get("attention_activation") == "laplace" else torch.where(visible > 0, 0.0, -torch.inf)
    mask = None if options.get("bidirectional") else mask

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = layer

        def forward(self, x):
            return self.cell(x.transpose(0, 1), attn_mask=mask)[0].transpose(0, 1) - x

    found = _run(Added(), _hidden(seed), seed)
    return {name.replace("weights/cell.", "weights/"): array for name, array in found.items()}


def mega_cells(root: Path, seed: int = 0) -> dict[str, Arrays]:
    """Softmax and Laplace, rotary and simple biases, over all tokens and in chunks, causal and not."""
    both = {"bidirectional": True, "rel_pos_bias": "simple"}
    return {
        "mega_both": _mega(root, seed, **both),
        "mega_chunk_both": _mega(root, seed, **both, attention_activation="laplace", chunk_size=MEGA["chunk_size"]),
        "mega": _mega(root, seed, rel_pos_bias="rotary"),
        "mega_laplace": _mega(root, seed, rel_pos_bias="simple", attention_activation="laplace"),
        "mega_chunk": _mega(root, seed, rel_pos_bias="simple", chunk_size=MEGA["chunk_size"]),
        "mega_chunk_laplace": _mega(
            root, seed, rel_pos_bias="rotary", attention_activation="laplace", chunk_size=MEGA["chunk_size"]
        ),
    }


ORACLES: dict[str, Callable[..., Arrays]] = {f.__name__: f for f in (hgrn, rwkv7, rg_lru, lfm2_conv, mamba, falcon_mamba)}


if __name__ == "__main__":
    golden = {name: oracle() for name, oracle in ORACLES.items()}
    if len(sys.argv) > 1:
        golden |= mega_cells(Path(sys.argv[1]))
    for name, arrays in golden.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **arrays)
