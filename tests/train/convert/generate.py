"""Writes `golden/NAME/`: small models of `transformers` as it saves them, with logits and greedy tokens. Needs the extra `oracle`.

    python tests/train/convert/generate.py [NAME ...]

Every parameter is moved off its initial value, so that zeros, ones and equal entries hide nothing.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.doge import modeling_doge

from plait.tests.train.convert.small_models import MODELS, VOCAB

GOLDEN = Path(__file__).parent / "golden"
LENGTH, STEPS = 24, 8


def generate(name: str) -> None:
    """Writes one folder."""
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options)
    write(name, transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


def later_of_equals(x: torch.Tensor, k: int, **options: Any) -> types.SimpleNamespace:
    """`torch.topk`, which takes any of equal ones: tokens that come again in what the model says."""
    best = torch.sort(x.flip(-1), dim=-1, descending=True, stable=True)
    return types.SimpleNamespace(indices=x.shape[-1] - 1 - best.indices[..., :k])


def write(name: str, model: transformers.PreTrainedModel) -> None:
    """Writes the folder of a model, its parameters moved."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=draws)
    if name.startswith("doge"):  # which chooses tokens by what they are
        ids = torch.stack([3 + torch.randperm(VOCAB - 3, generator=draws)[:LENGTH] for _ in ids])
        modeling_doge.torch = types.SimpleNamespace(**{**vars(torch), "topk": later_of_equals})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
        for path, buffer in model.named_buffers():
            if path.endswith(("e_score_correction_bias", "layer_scalar")):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=draws))
        logits = model(ids).logits
        tokens = ids
        for _ in range(STEPS):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9)
    model.save_pretrained(GOLDEN / name)
    found = {"ids": ids, "logits": logits, "greedy": tokens[:, LENGTH:]}
    save_file({key: value.contiguous() for key, value in found.items()}, GOLDEN / name / "golden.safetensors")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or MODELS:
        generate(wanted)
