"""Writes the generated tables of the documentation: `python docs/tables.py` updates them, `--check` says which are out of date.

A table stands between `<!-- table: NAME -->` and `<!-- end table -->` in a page of this folder, or in the README. What it
holds comes from the registries, the config classes and the text under their fields, so no page can say anything but the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import OptimizerConfig
from plait.configs.spike import SpikeConfig
from plait.configs.presets import presets
from plait.data.config import DataConfig
from plait.kernels import registered
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.base import MIXERS, MixerConfig
from plait.configs.probe import ProbeConfig
from plait.train.pods.hosts.host import HostsOptions
from plait.train.probes import docs as probes

FOLDER = Path(__file__).resolve().parent
PAGES = (FOLDER.parent / "README.md", *sorted(FOLDER.glob("*.md")))
COMMAND = "python docs/tables.py"
WIDTH, LENGTH = 1024, 4096  # at which mixers are compared, as in `launch.py list mixers`
PROOFS = {
    "interpreter": "agrees with the reference in an interpreter",
    "compiled": "compiled ahead of time, forward and backward",
    "hardware": "run on hardware",
}
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *lines))


def field_texts(schema: type) -> dict[str, str]:
    """The text under each field of a dataclass, on one line; empty where there is none."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for node, after in zip(tree.body, [*tree.body[1:], None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            documented = (
                isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
            )
            texts[node.target.id] = " ".join(str(after.value.value).split()) if documented else ""  # type: ignore[union-attr]
    return texts


def options(schema: type, prefix: str) -> str:
    """The fields of a config class as command-line flags, nested configs left out."""
    texts = field_texts(schema)
    rows = []
    for field in dataclasses.fields(schema):
        default = _default(field)
        if dataclasses.is_dataclass(default) or (default is _REQUIRED and _is_config(schema, field.name)):
            continue
        flag = f"--{prefix}{field.name.replace('_', '-')}"
        rows.append([f"`{flag}`", "required" if default is _REQUIRED else f"`{default}`", texts[field.name]])
    return markdown(("flag", "default", "meaning"), rows)


def mixers() -> str:
    """Registered mixers at one width and length."""
    rows = []
    for name, schema in MIXERS.all().items():
        config = schema()
        module = schema.__module__.removeprefix("plait.").replace(".", "/")
        rows.append(
            [
                f"[`{name}`](../{module}.py)",
                str(config.kind),
                f"{config.num_params(WIDTH) / 1e6:.2f}M",
                f"{config.flops(WIDTH, LENGTH) / 1e6:.1f}M",
                f"{config.state_bytes(WIDTH, LENGTH, 'bfloat16') / 2**20:.2f} MiB",
                config.source,
            ]
        )
    return markdown(("mixer", "kind", "parameters", "forward FLOPs per token", "decode state per sequence", "source"), rows)


def mixer_options() -> str:
    """The options of every registered mixer."""
    parts = []
    for name, schema in MIXERS.all().items():
        document = inspect.getdoc(schema) or ""
        wraps = any(field.name == "mixer" for field in dataclasses.fields(schema))
        prefix = f"model.mixers.{name}{'+NAME' if wraps else ''}.".replace("_", "-")
        parts.append(f"### `{name}`\n\n{document}\n\n{options(schema, prefix)}")
    return "\n" + "\n".join(parts) + "\n"


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
        rows += [[f"`{op}`", f"`{name}`", *(known[op][name][key] for key in PROOFS)] for name in names]
    return markdown(("op", "implementation", *PROOFS.values()), rows)


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
    "mixers": mixers,
    "mixer_options": mixer_options,
    "kernels": kernels,
    "proofs": proofs,
    "presets": preset_table,
    "stats": stats,
    "thresholds": thresholds,
    "probes": lambda: markdown(probes.PROBE_HEAD, probes.probe_rows()),
    "probe_metrics": lambda: markdown(probes.METRIC_HEAD, probes.metric_rows()),
    "experiment": lambda: options(ExperimentConfig, ""),
    "model": lambda: options(LMConfig, "model."),
    "channel_mixer": lambda: options(GatedMLPConfig, "model.channel-mixer."),
    "data": lambda: options(DataConfig, "data."),
    "optimizer": lambda: options(OptimizerConfig, "optimizer."),
    "mesh": lambda: options(MeshConfig, "mesh."),
    "spike": lambda: options(SpikeConfig, "spike."),
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


_REQUIRED = object()


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _REQUIRED if field.default is dataclasses.MISSING else field.default


def _is_config(schema: type, name: str) -> bool:
    """Whether a field holds a config of its own, by the class its annotation names."""
    annotation = inspect.get_annotations(schema)[name]
    found = sys.modules[schema.__module__].__dict__.get(annotation) if isinstance(annotation, str) else annotation
    return dataclasses.is_dataclass(found) or (isinstance(found, type) and issubclass(found, MixerConfig))


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
