"""What there is: the tables of `launch.py list`, and of the docs that show the same."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from plait.configs.components import Component, Registry, registries
from plait.configs.presets import presets
from plait.configs.vocabulary import with_vocabulary
from plait.kernels import registered
from plait.models.layers.linear import dense_layers
from plait.models.lm import num_params
from plait.models.mixers.base import HeadMixer, WrapperConfig, abstract

KINDS = {
    "mixer": "plait.models.mixers.base",
    "channel mixer": "plait.models.channel_mixers.base",
    "position": "plait.models.positions.base",
    "optimizer": "plait.configs.optimizer",
    "task": "plait.data.tasks.base",
    "probe": "plait.train.probes.base",
    "model type": "plait.models.hf.base",
    "reshape": "plait.train.convert.reshapes.base",
    "sweep": "plait.configs.sweeps.base",
}
"""The kinds of components, and the module that makes the registry of each."""
WIDTH, LENGTH = 1024, 4096
"""Width and tokens at which models' components are compared."""


def registry(kind: str) -> Registry[Any]:
    """The registry of a kind of component."""
    importlib.import_module(KINDS[kind])
    return registries[kind]


def summary(config: type[Component]) -> str:
    """The first sentence of a component's documentation."""
    return " ".join((inspect.getdoc(config) or "").split("\n\n")[0].split())


def cost(config: Any) -> str:
    """How the work of mixing grows with the number of tokens T, from the counts at two lengths."""
    near, far = (config.mixing_flops(WIDTH, length) for length in (LENGTH, 16 * LENGTH))
    return "T" if far <= 1.2 * near else "T^2" if far > 8 * near else "T log T"


def state(config: Any) -> str:
    """Bytes of decode state, and whether they grow with the number of tokens."""
    most = min(2 * LENGTH, config.longest or 2 * LENGTH)
    less, now = (config.state_bytes(WIDTH, length, "bfloat16") for length in (most // 4, most // 2))
    where = f" at {most // 2:,}" if most < 2 * LENGTH else ""
    size = f"{now / 2**20:.2f} MiB" if now >= 2**20 else f"{now / 2**10:.1f} KiB"
    return f"{size}{where}, {'grows' if now > less else 'fixed'}"


def kernels_of(config: Any) -> str:
    """The ops that a mixer runs on, each with the accelerators that have a kernel for it."""
    chips = lambda op: [one.platform.upper() for one in op.implementations.values() if one.platform]
    return (
        ", ".join(op.name + (f" ({', '.join(found)})" if (found := chips(op)) else "") for op in config.ops(WIDTH)) or "plain JAX"
    )


def fits(config: Any) -> str:
    """The options of any layer that a mixer takes."""
    module, ops = abstract(config, WIDTH), config.ops(WIDTH)
    found = {
        "MoH": isinstance(module, HeadMixer) and module.num_heads > 1 and not isinstance(config, WrapperConfig),
        "sigmaReparam": bool(dense_layers(module)),
        "context parts": bool(ops) and all(op.rule is not None for op in ops),
        "both directions": len(config.directions) > 1,
        "bidirectional only": config.directions == ("bidirectional",),
        "implied attention": isinstance(module, HeadMixer) and config.opaque is None,
    }
    return ", ".join(word for word, true in found.items() if true)


def families(config: type[Any]) -> str:
    """The published models that have a mixer, as `convert` knows them."""
    return ", ".join(name for name, family in registry("model type").all().items() if config.name in family.mixers) or "plait"


COLUMNS: dict[str, dict[str, Callable[[type[Any]], str]]] = {
    "mixer": {
        "kind": lambda config: config().kind,
        "cost": lambda config: cost(config()),
        "parameters": lambda config: f"{config().num_params(WIDTH) / 1e6:.2f}M",
        "forward FLOPs per token": lambda config: f"{config().flops(WIDTH, LENGTH) / 1e6:.1f}M",
        "decode state per sequence": lambda config: state(config()),
        "ops (kernels)": lambda config: kernels_of(config()),
        "takes": lambda config: fits(config()),
        "proof": lambda config: config.proof,
        "model types": families,
    },
    "channel mixer": {
        "parameters": lambda config: f"{config().num_params(WIDTH) / 1e6:.2f}M",
        "forward FLOPs per token": lambda config: f"{config().flops(WIDTH) / 1e6:.1f}M",
    },
    "position": {"where it acts": lambda config: config.place, "what it is": summary},
    "model type": {
        "class in transformers": lambda family: family.architecture,
        "models": lambda family: (inspect.getdoc(inspect.getmodule(family)) or "").split("\n")[0],
    },
    "probe": {
        "what it is": summary,
        "statistics": lambda probe: ", ".join(one.name for one in probe.statistics),
        "runs": lambda probe: "by default" if probe.by_default else "where it is named",
    },
}
"""What sets the components of a kind apart, where that is more than words."""


BRIEF = {"mixer": ("kind", "cost", "decode state per sequence")}
"""The columns of tables that are too wide for a narrow terminal which it gets."""


def component_rows(
    kind: str, names: Sequence[str] | None = None, brief: bool = False
) -> tuple[list[str], list[tuple[type[Component], list[str]]]]:
    """The columns of the table of a kind, and each component (or those of the names) with what stands in them.

    Raises:
        ValueError: a name is unknown.
    """
    columns = {**COLUMNS.get(kind, {"what it is": summary}), "source": lambda config: config.source}
    kept = {name: cell for name, cell in columns.items() if not brief or name in BRIEF[kind]}
    known = registry(kind)
    found = [known[name] for name in (known if names is None else names)]
    return list(kept), [(one, [cell(one) for cell in kept.values()]) for one in found]


def component_table(kind: str, brief: bool = False) -> Table:
    """The components of a kind; those columns that fit a narrow terminal where `brief`."""
    head, rows = component_rows(kind, brief=brief)
    at = f", at width {WIDTH:,} and {LENGTH:,} tokens" if kind in ("mixer", "channel mixer") else ""
    return _table(f"{kind.capitalize()}s{at}", [kind, *head], [[config.name, *cells] for config, cells in rows])


def component_records(kind: str, names: Sequence[str]) -> Table:
    """What the table says of some components, a line each. Raises ValueError for a name that is unknown."""
    head, rows = component_rows(kind, names)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for config, cells in rows:
        for column, cell in zip([kind, *head], [config.name, *cells], strict=True):
            grid.add_row(column, cell)
        grid.add_row()
    return grid


def preset_table() -> Table:
    """Presets with their size and purpose."""
    rows = []
    for name, function in presets().items():
        model = with_vocabulary(function()).model
        purpose = (function.__doc__ or "").strip().splitlines()[0]
        rows.append([name, f"{num_params(model) / 1e6:,.1f}M", f"{model.num_layers} x {model.pattern}", purpose])
    return _table("Presets: launch.py train NAME", ["preset", "parameters", "layers", "purpose"], rows)


def kernel_table() -> Table:
    """Ops and their implementations in the order `auto` tries them."""
    return _table("Kernels", ["op", "implementations"], [[op, ", ".join(names)] for op, names in registered().items()])


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    table.add_column(
        head[0], no_wrap=True, min_width=max(map(len, [head[0], *(row[0] for row in rows)]))
    )  # names are for copying
    for column in head[1:]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


TABLES: dict[str, Callable[[], Table]] = {
    "presets": preset_table,
    **{f"{kind.replace(' ', '-')}s": functools.partial(component_table, kind) for kind in KINDS},
    "kernels": kernel_table,
}
"""What can be listed."""
