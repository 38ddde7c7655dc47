"""fla's plain torch references, timed beside our ops on a CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

Arrays = dict[str, Any]


def torch_peers(op: str, x: Arrays) -> dict[str, Callable[[bool], None]]:
    """fla's plain torch references on the CPU: functions of whether the gradients are wanted too. They are the naive forms, no kernels.

    Their files are loaded alone, since fla itself needs Triton.
    """
    spec = importlib.util.find_spec("torch") and importlib.util.find_spec("fla")
    calls = {  # file, function, its gates
        "scalar_decay": ("simple_gla", "naive_chunk_simple_gla", ("g",)),
        "vector_decay": ("gla", "naive_recurrent_gla", ("g",)),
        "deltanet": ("delta_rule", "delta_rule_chunkwise", ("beta",)),
        "gated_deltanet": ("gated_delta_rule", "naive_chunk_gated_delta_rule", ("g", "beta")),
        "kda": ("kda", "naive_chunk_kda", ("g", "beta")),
    }
    if op not in calls or not spec or jax.default_backend() != "cpu":
        return {}
    import torch

    file, name, gates = calls[op]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    path = Path(spec.submodule_search_locations[0]) / "ops" / file / "naive.py"
    module_spec = importlib.util.spec_from_file_location(f"fla_naive_{file}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    head_major = op == "deltanet"
    tensors = {key: torch.tensor(np.asarray(value, np.float32)) for key, value in x.items()}
    tensors = {key: (value.transpose(1, 2).contiguous() if head_major else value) for key, value in tensors.items()}

    def run(backward: bool) -> None:
        given = {key: value.detach().requires_grad_(backward) for key, value in tensors.items()}
        o = getattr(module, name)(*(given[key] for key in ("q", "k", "v", *gates)))
        if backward:
            (o[0] if isinstance(o, tuple) else o).sum().backward()

    return {f"fla {name}": run}
