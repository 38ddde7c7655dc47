"""Golden steps of `torch.optim.Muon`: `python tests/train/optimizers/golden/generate.py` writes the .npz file beside it.

Needs torch (see the `oracle` extra). Its Newton-Schulz iterations run in float32 here, in place of bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np

STEPS = 3
SHAPES = {"wide": (12, 20), "tall": (20, 12)}
"""Of PyTorch's matrices, `[out, in]`."""
CASES = {
    "nesterov": {"lr": 0.02, "adjust_lr_fn": "original", "weight_decay": 0.1, "momentum": 0.95, "nesterov": True},
    "plain momentum": {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1, "momentum": 0.8, "nesterov": False},
}


def arrays() -> dict[str, np.ndarray]:
    """Starts, gradients and, for each case, ends of every matrix."""
    import torch

    random = np.random.RandomState(0)
    found = {}
    for name, shape in SHAPES.items():
        for what in ("start", *(f"gradient{step}" for step in range(STEPS))):
            found[f"{name}/{what}"] = random.normal(size=shape).astype(np.float32)
    for case, options in CASES.items():
        matrices = {name: torch.nn.Parameter(torch.tensor(found[f"{name}/start"])) for name in SHAPES}
        optimizer = torch.optim.Muon(matrices.values(), **options)
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            for step in range(STEPS):
                for name, matrix in matrices.items():
                    matrix.grad = torch.tensor(found[f"{name}/gradient{step}"])
                optimizer.step()
        found |= {f"{case}/{name}/end": matrix.detach().numpy() for name, matrix in matrices.items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("muon.npz"), **arrays())
