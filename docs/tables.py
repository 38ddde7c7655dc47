"""Writes the generated tables of the documentation: `python docs/tables.py` updates them, `--check` says which are out of date.

A table stands between `<!-- table: NAME -->` and `<!-- end table -->` in a page of this folder, or in the README. What it
holds comes from the registries, the config classes and the text under their fields, so no page can say anything but the code.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from plait.configs.components import Component, default_of
from plait.configs.event import EventConfig
from plait.configs.experiment import ExperimentConfig
from plait.configs.listing import KINDS, component_rows, registry
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import OptimizerConfig
from plait.configs.presets import presets
from plait.configs.probe import ProbeConfig
from plait.configs.spike import SpikeConfig
from plait.data.config import DataConfig
from plait.kernels import registered
from plait.models.attention_losses import AttentionLossConfig
from plait.models.config import LMConfig
from plait.models.dropout import DropoutConfig
from plait.models.layers.layer_inputs import LayerInputsConfig
from plait.models.layers.lora import LoRAConfig
from plait.models.mixers.base import WrapperConfig
from plait.models.qk_clip import QKClipConfig
from plait.train.pods.hosts.host import HostsOptions
from plait.train.probes import docs as probes
from plait.train.verify.agreement import PART as AGREEMENT

FOLDER = Path(__file__).resolve().parent
PAGES = (FOLDER.parent / "README.md", *sorted(FOLDER.glob("*.md")))
COMMAND = "python docs/tables.py"
FLAGS = {
    "mixer": "model.mixers.NAME.",
    "channel mixer": "model.channel-mixer.",
    "position": "model.mixers.softmax.positions.",
    "optimizer": "optimizer.",
    "task": "data.task.",
    "reshape": "",
}
"""What the flags of a component's options begin with, by kind; NAME is its own."""
SHARED: dict[str, type] = {"optimizer": OptimizerConfig}
"""Bases whose options stand in a table of their own."""
PROOFS = {
    "interpreter": "agrees with the reference in an interpreter",
    "compiled": "compiled ahead of time, forward and backward",
}
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *lines))


def field_texts(schema: type) -> dict[str, str]:
    """The text under each field of a dataclass, on one line; empty where there is none."""
    texts: dict[str, str] = {}
    for owner in reversed([one for one in schema.__mro__ if dataclasses.is_dataclass(one)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                texts[node.target.id] = " ".join(text.split()) if isinstance(text, str) else ""
    return texts


def options(schema: type, prefix: str, base: type = object) -> str:
    """The fields of a config class as command-line flags, nested configs left out; a component is named.

    Args:
        base: whose fields are left out where their defaults are the same.
    """
    texts, hints = field_texts(schema), typing.get_type_hints(schema)
    known = {field.name: default_of(field) for field in dataclasses.fields(base)} if dataclasses.is_dataclass(base) else {}
    rows = []
    for field in dataclasses.fields(schema):
        default = default_of(field)
        if field.name in known and known[field.name] == default:
            continue
        flag, shown = f"--{prefix}{field.name.replace('_', '-')}", f"`{default}`"
        if isinstance(default, Component):
            shown = f"`{default.name}`"
        elif isinstance(default, tuple) and default and all(isinstance(one, Component) for one in default):
            flag, shown = f"{flag}.N", ", ".join(f"`{one.name}`" for one in default)
        elif default is dataclasses.MISSING and not dataclasses.is_dataclass(hints[field.name]):
            shown = "required"
        elif default is dataclasses.MISSING or dataclasses.is_dataclass(default):
            continue
        rows.append([f"`{flag}`", shown, texts[field.name]])
    return markdown(("flag", "default", "meaning"), rows) if rows else ""


def components(kind: str) -> str:
    """The registered components of a kind."""
    head, rows = component_rows(kind)
    return markdown((kind, *head), ([f"[`{config.name}`](../{_file(config)})", *cells] for config, cells in rows))


def component_options(kind: str, heading: str) -> str:
    """The options of every component of a kind, each below a heading of that level."""
    parts = []
    for name, schema in registry(kind).all().items():
        prefix = FLAGS[kind].replace("NAME", f"{name}+NAME" if issubclass(schema, WrapperConfig) else name).replace("_", "-")
        table = options(schema, prefix, SHARED.get(kind, object))
        parts.append(f"{heading} `{name}`\n\n{inspect.getdoc(schema)}\n\n{table}")
    return "\n" + "\n".join(parts) + "\n"


def _file(config: type) -> str:
    return config.__module__.removeprefix("plait.").replace(".", "/") + ".py"


def kernels() -> str:
    """Ops and their implementations, in the order in which `auto` tries them."""
    return markdown(
        ("op", "implementations, in the order of `auto`"), ([f"`{op}`", ", ".join(names)] for op, names in registered().items())
    )


def proofs() -> str:
    """What is proven of each accelerator kernel, from `proofs.json`. Raises ValueError where that and the registry differ."""
    known = json.loads((FOLDER / "proofs.json").read_text("utf-8"))
    everywhere = registered(everywhere=True)
    kernels = {op: [name for name in names if name not in everywhere[op]] for op, names in registered().items()}
    rows = []
    for op, names in kernels.items():
        if (listed := sorted(known.get(op, {}))) != sorted(names):
            raise ValueError(
                f"docs/proofs.json lists {listed} for {op}, the registry has {sorted(names)}; describe what is there"
            )
        rows += [[f"`{op}`", f"`{name}`", *(known[op][name][key] for key in PROOFS), on_hardware(op, name)] for name in names]
    return markdown(("op", "implementation", *PROOFS.values(), "run on hardware"), rows)


def on_hardware(op: str, implementation: str, folder: Path = FOLDER / "hardware") -> str:
    """What the files that `launch.py verify` wrote, kept in a folder, say of an implementation: device, date and result of each."""
    told = []
    for file in sorted(folder.glob("*.json")):
        facts = json.loads(file.read_text("utf-8"))
        agreed = [one for one in facts["findings"] if one["part"] == AGREEMENT and one["status"] in ("passed", "failed")]
        tried = [one["status"] for one in agreed if (one["op"], one["by"]) == (op, implementation)]
        if tried:
            where = f"{facts['devices']['kind']}, JAX {facts['versions']['jax']}, {facts['at'][:10]}"
            told.append(f"{where}: {tried.count('passed')} of {len(tried)} trials pass")
    return "; ".join(told) or "not yet"


def preset_table() -> str:
    """Presets, their purpose and where they run."""
    rows = []
    for name, function in presets().items():
        model = function().model
        document = " ".join((function.__doc__ or "").split())
        rows.append([f"`{name}`", f"{model.num_layers} x `{model.pattern}`", document])
    return markdown(("preset", "layers", "what it is"), rows)


def stats() -> str:
    """Statistics of all probes."""
    return markdown(probes.STATISTIC_HEAD, probes.statistic_rows())


def thresholds() -> str:
    """Kinds of events and their limits."""
    return markdown(probes.EVENT_HEAD, probes.event_rows())


TABLES: dict[str, Callable[[], str]] = {
    **{f"{kind.replace(' ', '_')}s": functools.partial(components, kind) for kind in KINDS},
    "mixer_options": lambda: component_options("mixer", "###"),
    "channel_mixer_options": lambda: component_options("channel mixer", "####"),
    "position_options": lambda: component_options("position", "####"),
    "optimizer_options": lambda: component_options("optimizer", "####"),
    "task_options": lambda: component_options("task", "####"),
    "reshape_options": lambda: component_options("reshape", "###"),
    "kernels": kernels,
    "proofs": proofs,
    "presets": preset_table,
    "stats": stats,
    "thresholds": thresholds,
    "probe_metrics": lambda: markdown(probes.METRIC_HEAD, probes.metric_rows()),
    "experiment": lambda: options(ExperimentConfig, ""),
    "model": lambda: options(LMConfig, "model."),
    "data": lambda: options(DataConfig, "data."),
    "optimizer": lambda: options(OptimizerConfig, "optimizer."),
    "mesh": lambda: options(MeshConfig, "mesh."),
    "attention_loss": lambda: options(AttentionLossConfig, "model.attention-loss."),
    "dropout": lambda: options(DropoutConfig, "model.dropout."),
    "qk_clip": lambda: options(QKClipConfig, "model.qk-clip."),
    "lora": lambda: options(LoRAConfig, "model.lora."),
    "layer_inputs": lambda: options(LayerInputsConfig, "model.layer-inputs."),
    "spike": lambda: options(SpikeConfig, "spike."),
    "event": lambda: options(EventConfig, "event.KIND."),
    "hosts": lambda: options(HostsOptions, "hosts."),
    "probe": lambda: options(ProbeConfig, "probe."),
}
"""What a page can hold."""


def updated(text: str) -> str:
    """A page's text with every table as it is now. Raises ValueError for a table that does not exist."""

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"table {match[2]!r} does not exist; use one of {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]]() + match[3]

    return _MARKED.sub(table, text)


def outdated() -> dict[Path, str]:
    """The pages whose tables have changed, with their new text."""
    texts = {page: page.read_text("utf-8") for page in PAGES}
    return {page: new for page, old in texts.items() if (new := updated(old)) != old}


def main(args: Sequence[str]) -> int:
    """Updates the pages, or with `--check` only names those that are out of date; exit status 1 if there are any."""
    changed = outdated()
    for page, text in changed.items():
        print(f"{page.relative_to(FOLDER.parent)}: " + ("out of date" if "--check" in args else "updated"))
        if "--check" not in args:
            page.write_text(text, "utf-8")
    return 1 if changed and "--check" in args else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
