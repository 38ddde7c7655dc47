"""Golden models as models are published: bfloat16 but for what stays float32, in several files, with ids of bytes."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.train.convert.fitting import examined
from plait.train.convert.reading import CONFIG
from plait.train.convert.weights import INDEX, ONE

GOLDEN = Path(__file__).parent / "golden"
ROUNDED = "rounded.safetensors"
"""In a golden folder: logits at each `APART`th id and greedy tokens, of transformers or fla with the files that `publish` makes."""
VOCAB, WIDE = 62, 264
FILES, APART = 3, 4
FLOAT32 = {
    "*.gate.weight": ("bailing_hybrid", "deepseek_v", "glm_moe_dsa", "kimi_linear", "nemotron_h"),
    "*.attn.[go]_norm.weight": ("fla_delta_net_plain", "fla_gated_deltanet_plain", "fla_gated_deltaproduct_plain", "fla_hgrn2"),
}
"""Tensors that transformers or fla keeps in float32, and saves so, in the models whose names begin so."""


def saved_wide(name: str) -> list[str]:
    """Those of a golden model: patterns."""
    return [pattern for pattern, names in FLOAT32.items() if name.startswith(names)]


def publish(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Writes the golden model `name` to `folder`; gives its tensors. Rows of the embedding for ids that golden ones lack are drawn."""
    folder.mkdir()
    fields = json.loads((GOLDEN / name / CONFIG).read_text())
    sizes = {key: WIDE for key in ("vocab_size", "vocab_size_per_layer_input") if fields.get(key) == VOCAB}
    (folder / CONFIG).write_text(json.dumps({**fields, **sizes, "dtype": "bfloat16"}, indent=2))
    found, draws = examined(GOLDEN / name), np.random.default_rng(0)
    kept = {found.weights.tensors[given].name for line in found.lines if line.float32 for given in line.tensors}
    made = found.source.family.ignored  # of the config, as exactly there as here
    tensors = {}
    for given, golden in sorted(load_file(GOLDEN / name / ONE).items()):
        whole = golden
        if golden.shape[0] == VOCAB:
            more = draws.normal(scale=0.1, size=(WIDE - VOCAB, *golden.shape[1:]))
            whole = np.concatenate([golden, more.astype(np.float32)])
        wide = given in kept or any(fnmatch(given, pattern) for pattern in (*made, *saved_wide(name)))
        tensors[given] = whole if wide else whole.astype(jnp.bfloat16)
    names, index = list(tensors), {}
    for i in range(FILES):
        file = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        part = names[i::FILES]
        save_file({one: tensors[one] for one in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    ByteTokenizer().save(folder)
    return tensors
