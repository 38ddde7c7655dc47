"""Writes `golden/NAME/rounded.safetensors`: logits and greedy tokens of bfloat16 files (`rounded`), computed in float32 by transformers, or by
flash-linear-attention as in `generate_fla`. Needs the extra `oracle`, and fla for its models.

    python tests/train/convert/generate_rounded.py [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
import types
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.doge import modeling_doge

from plait.tests.tolerances import assert_close
from plait.tests.train.convert.generate import STEPS, later_of_equals
from plait.tests.train.convert.rounded import APART, GOLDEN, ROUNDED, publish
from plait.train.convert.fitting import Source


def loaded(name: str, folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The golden model `name` that is in a folder. Raises AssertionError where a tensor has no place there, or is missing and not made of the
    config (those that the family ignores)."""
    if name.startswith("doge"):
        modeling_doge.torch = types.SimpleNamespace(**{**vars(torch), "topk": later_of_equals})
    options = {} if name.startswith("fla_") else {"attn_implementation": "eager"}
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype=dtype, output_loading_info=True, **options)
    made = Source.of(folder).family.ignored
    info["missing_keys"] = {key for key in info["missing_keys"] if not any(fnmatch(key, pattern) for pattern in made)}
    assert not any(info.values()), (name, info)
    return model.eval()


def said(model: transformers.PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and greedy tokens."""
    with torch.no_grad():
        logits, tokens = model(ids).logits, ids
        for _ in range(STEPS):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return {"logits": logits[:, ::APART].contiguous(), "greedy": tokens[:, ids.shape[1] :].contiguous()}


def generate(name: str) -> None:
    """Writes one file."""
    ids = load_file(GOLDEN / name / "golden.safetensors")["ids"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / name
        tensors = publish(name, folder)
        rounded = loaded(name, folder, torch.bfloat16).named_parameters()
        kept = {path for path, value in rounded if value.dtype == torch.float32}
        assert all(tensors[path].dtype == "float32" for path in kept & tensors.keys()), (name, kept)
        save_file(said(loaded(name, folder, torch.float32), ids), GOLDEN / name / ROUNDED)


def check(name: str, folder: Path) -> None:
    """Raises AssertionError unless the golden model `name` that is in a folder says what is written of it."""
    golden, ids = load_file(GOLDEN / name / ROUNDED), load_file(GOLDEN / name / "golden.safetensors")["ids"]
    found = said(loaded(name, folder, torch.float32), ids)
    assert_close(found["logits"].numpy(), golden["logits"].numpy(), dtype="float32", err_msg=name)
    assert torch.equal(found["greedy"], golden["greedy"]), name


if __name__ == "__main__":
    wanted = sys.argv[1:] or sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
    if any(name.startswith("fla_") for name in wanted):
        from plait.tests.train.convert.generate_fla import install

        install()
    for name in wanted:
        generate(name)
