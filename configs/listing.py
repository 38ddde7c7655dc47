"""The tables of `launch.py list`."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from plait.configs.presets import presets
from plait.configs.vocabulary import with_vocabulary
from plait.kernels import registered
from plait.models.lm import num_params
from plait.models.mixers.base import MIXERS


def preset_table() -> Table:
    """Presets with their size and purpose."""
    table = Table("preset", "parameters", "layers", "purpose", title="Presets: launch.py train NAME")
    for name, function in presets().items():
        model = with_vocabulary(function()).model
        purpose = (function.__doc__ or "").strip().splitlines()[0]
        table.add_row(name, f"{num_params(model) / 1e6:,.1f}M", f"{model.num_layers} x {model.pattern}", purpose)
    return table


def mixer_table() -> Table:
    """Registered mixers at width 1,024."""
    table = Table(
        "mixer",
        "kind",
        "parameters",
        "forward FLOPs/token at 4,096",
        "decode state at 4,096",
        "source",
        title="Mixers, at width 1,024",
    )
    for name, config_class in MIXERS.all().items():
        config = config_class()
        flops, state = config.flops(1024, 4096), config.state_bytes(1024, 4096, "bfloat16")
        table.add_row(
            name,
            str(config.kind),
            f"{config.num_params(1024) / 1e6:.2f}M",
            f"{flops / 1e6:.1f}M",
            f"{state / 2**20:.2f} MiB",
            config.source,
        )
    return table


def task_table() -> Table:
    """Evaluation tasks."""
    table = Table("task", "what it gives", title="Tasks: launch.py eval RUN --tasks NAME")
    table.add_row("ppl", "loss, perplexity, bits per byte and loss by position on the run's held-out text")
    return table


def kernel_table() -> Table:
    """Ops and their implementations in the order `auto` tries them."""
    table = Table("op", "implementations", title="Kernels")
    for op, names in registered().items():
        table.add_row(op, ", ".join(names))
    return table


TABLES: dict[str, Callable[[], Table]] = {
    "presets": preset_table,
    "mixers": mixer_table,
    "tasks": task_table,
    "kernels": kernel_table,
}
"""What can be listed."""
