"""`launch.py convert inspect|import|export|reshape|rank|linearize`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from rich.table import Table

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import flag, parse
from plait.configs.domains import Counted, Line, Seed, Span
from plait.train.convert.options import By, GatesConfig, ImportOptions
from plait.train.pods.hosts import heartbeat
from plait.train.pods.hosts.host import HostsError
from plait.train.pods.hosts.on_hosts import on_hosts
from plait.train.terminal.console import console, write_lines

USAGE = """usage: launch.py convert inspect DIR|FILE.gguf
       launch.py convert import DIR|FILE.gguf RUN [--seq-len 4096]
           [--param-dtype bfloat16] [--tokenizer FILE] [--mesh.fsdp 8] [--hosts.*]
       launch.py convert export RUN DIR [--model-type llama] [--dtype bfloat16]
           [--step N] [--hosts.*]
       launch.py convert reshape RUN NEW KIND [--text FILE] [--step N]
           [options of the kind]                      (launch.py list reshapes)
       launch.py convert rank RUN [--by recall|far|entropy|gates] [--text FILE]
           [--keep 8 | --keep-heads 20] [--student lolcats]
       launch.py convert linearize RUN NEW --pattern "lolcats*3,softmax"
           [--heads 3.1,12.0] [--window-size 64] [options of train]
       launch.py convert KIND --help                      says what each is for"""


_Model = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR|FILE.gguf")]
_Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
_Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
_New = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NEW")]
_Kind = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="KIND")]
"""As USAGE has them."""


@dataclasses.dataclass(frozen=True)
class InspectArgs:
    """Says what a published model is, and how its tensors go with the model here; reads no weights."""

    folder: _Model
    """With config.json and safetensors files; or a GGUF file."""


@dataclasses.dataclass(frozen=True)
class ImportArgs(ImportOptions):
    """Makes a run folder of a published model."""

    ADDRESSES: ClassVar = ("run",)

    folder: _Model
    """With config.json, safetensors files and tokenizer.json; or a GGUF file."""
    run: _Run
    """Run folder to be made."""


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Writes the model of a run as a published one."""

    ADDRESSES: ClassVar = ("run",)

    run: _Run
    """Run folder."""
    folder: _Folder
    """To be made."""
    model_type: str | None = None
    """The family; by default one that has such models, or else the project's own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the tensors; by default that of an imported model's files, or else that of the run's parameters."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""


@dataclasses.dataclass(frozen=True)
class ReshapeArgs:
    """Makes a run folder of a run's model changed, and says by how much its logits move. Each kind has options of its own."""

    ADDRESSES: ClassVar = ("run", "new")

    run: _Run
    """Run folder, which stays as it is."""
    new: _New
    """Run folder to be made."""
    kind: _Kind
    """What is changed; `launch.py list reshapes` shows what can be."""
    text: Path | None = None
    """UTF-8 text on which logits are compared; random ids by default."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""
    seed: Seed = 0
    """Of the choice of ids or text."""


@dataclasses.dataclass(frozen=True)
class RankArgs:
    """Ranks the layers of softmax attention by how much they need it, and gives the options of linearize that keep the first of them."""

    ADDRESSES: ClassVar = ("run",)

    run: _Run
    """Run folder, which stays as it is."""
    by: By = "recall"
    """`recall`: the strongest head's weight on what followed the same token before, in random tokens that come twice; `far`: the mean head's
    weight beyond a window; `entropy`: how spiky the mean head's weights are; `gates`: how open the mean head's trained gate stays between all
    tokens and a window, where keys are asked for that lie far back. `far` and `entropy` are of a text, `gates` of one or the run's task."""
    keep: Counted | None = None
    """Layers that stay softmax; None keeps a quarter, or none where heads are kept."""
    keep_heads: Counted | None = None
    """Heads that stay softmax, in place of layers."""
    student: Line = "lolcats"
    """What the others become."""
    text: Path | None = None
    """UTF-8 text."""
    far: Span = 64
    """Tokens back from which `far` counts, and of the window of `gates`."""
    gates: GatesConfig = GatesConfig()
    """How gates are trained."""
    seed: Seed = 0
    """Of the choice of ids or text."""


@dataclasses.dataclass(frozen=True)
class LinearizeArgs:
    """Makes a hybrid of a run's softmax attention in two trainings: the new layers learn to give what the attention gives, then the model is
    tuned with them. All of it lies in the folder, and the same line goes on with what is not done.

    Options of `train` hold for both trainings, with `--transfer.` or `--tune.` before them for one: `--transfer.steps 500`.
    """

    ADDRESSES: ClassVar = ("run",)

    run: _Run
    """Run folder, which stays as it is."""
    new: _New
    """Folder of the runs."""
    pattern: Line
    """The mixer of each layer, as `model.pattern` names them: "lolcats*3,softmax"."""
    heads: Line | None = None
    """Heads that stay softmax in layers that change, as LAYER.HEAD from 0: "3.1,12.0"."""
    window_size: Span = 64
    """Tokens with exact weights, where the new mixer has a window (lolcats)."""


ARGS: dict[str, Any] = {
    "inspect": InspectArgs,
    "import": ImportArgs,
    "export": ExportArgs,
    "reshape": ReshapeArgs,
    "rank": RankArgs,
    "linearize": LinearizeArgs,
}
"""The options of each conversion."""
ON_HOSTS = ("import", "export")
"""Those that several hosts can do together."""


def parsed(args: Sequence[str]) -> tuple[Any, ...]:
    """The options of the conversion that the words name; of a reshape also those of its kind."""
    name, words, prog = args[0], list(args[1:]), f"launch.py convert {args[0]}"
    if name == "linearize":
        return _linearize_parsed(words, prog)
    if name != "reshape":
        return (parse(ARGS[name], words, prog=prog),)
    places = 3
    if not words or words[0].startswith("-") or len(words) < places:
        return (parse(ReshapeArgs, words, prog=prog),)  # says what is missing, or helps
    from plait.train.convert.reshapes.base import RESHAPES

    kind = RESHAPES[words[2]]
    mine, own = split_options(ReshapeArgs, words[places:])
    if {"-h", "--help"} & set(mine):
        own = ["--help"]
    others = [flag(field.name) for field in dataclasses.fields(ReshapeArgs)[places:]]
    reshape = parse(kind, own, prog=f"{prog} RUN NEW {kind.name}", others=others, description=inspect.getdoc(kind))
    return parse(ReshapeArgs, words[:places] + mine, prog=prog), reshape


def _linearize_parsed(words: list[str], prog: str) -> tuple[Any, ...]:
    """The options of linearising, and the words for both trainings and for each."""
    stages = []
    for stage in ("transfer.", "tune."):
        own, words = split_options(LinearizeArgs, words, prefix=stage)
        stages.append([word.replace(f"--{stage}", "--", 1) for word in own])
    mine, rest = split_options(LinearizeArgs, words)
    folders = [word for word in rest[:2] if not word.startswith("-")]
    return parse(LinearizeArgs, [*folders, *mine], prog=prog), rest[len(folders) :], *stages


def run(args: Sequence[str]) -> int:
    """One of the conversions."""
    actions: dict[str, Callable[..., int | None]] = {
        "inspect": _inspect,
        "import": _import,
        "export": _export,
        "reshape": _reshape,
        "rank": _rank,
        "linearize": _linearize,
    }
    if not args or args[0] in ("-h", "--help"):
        write_lines(USAGE)
        return 0
    if args[0] not in actions:
        raise ValueError(f"convert {args[0]!r} is none of {', '.join(actions)}\n\n{USAGE}")
    work = lambda rest: actions[args[0]](*parsed([args[0], *rest])) or 0
    if args[0] in ON_HOSTS:
        return on_hosts("convert", args, lambda words, _: _watched(work, words[1:]), resumes=False)
    if any(word.startswith("--hosts.") for word in args):
        raise HostsError(f"convert {args[0]} runs in one process, {' and '.join(ON_HOSTS)} on several hosts; leave --hosts out")
    return work(args[1:])


def _watched(work: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Reading and writing may take as long as that of weights does."""
    with heartbeat.phase("weights"):
        return work(words)


def _inspect(options: InspectArgs) -> None:
    from plait.train.convert.inspecting import describe

    write_lines(describe(options.folder))


def _import(options: ImportArgs) -> None:
    from plait.train.convert.importing import import_model
    from plait.train.remote.session import made

    with made(options.run, "run") as run:
        model = import_model(options.folder, run, options).model
    _say(f"{options.run}: {model.num_layers} layers of {model.pattern}; try launch.py eval {options.run}")


def _export(options: ExportArgs) -> None:
    from plait.train.convert.exporting import export_model
    from plait.train.remote.reading import run_here

    run = run_here(options.run, step=options.step)
    family = export_model(run, options.folder, model_type=options.model_type, dtype=options.dtype, step=options.step)
    _say(f"{options.folder}: {family.architecture}")


def _say(line: str) -> None:
    """Once, whatever the number of hosts."""
    from plait.train.pods.hosts.together import first

    if first():
        console.print(line, markup=False)


def _reshape(options: ReshapeArgs, reshape: Any) -> None:
    from plait.train.convert.reshaping import reshape_run
    from plait.train.remote.reading import run_here
    from plait.train.remote.session import made

    run = run_here(options.run, step=options.step)
    with made(options.new, "new") as new:
        found = reshape_run(run, new, reshape, text=options.text, step=options.step, seed=options.seed)
    write_lines(f"{options.new}: {options.kind} of {options.run} at step {found.step}\n{found.describe()}")


def _rank(options: RankArgs) -> None:
    from plait.train.convert.linearize.ranking import rank
    from plait.train.remote.reading import run_here

    if options.keep is not None and options.keep_heads is not None:
        raise ValueError(f"keep={options.keep} layers and keep_heads={options.keep_heads} cannot both be; give one of them")
    found = rank(run_here(options.run), options.by, text=options.text, far=options.far, seed=options.seed, gates=options.gates)
    heads: list[tuple[int, int]] = []
    if options.keep_heads is None:
        kept = found.kept(max(1, len(found.layers) // 4) if options.keep is None else options.keep)
    else:
        kept, heads = found.kept_heads(options.keep_heads)
    pattern = found.pattern(kept, options.student)
    table = Table(title=f"{options.run}: need of full attention by {options.by}")
    for title in ("layer", "need", "strongest head", "becomes"):
        table.add_column(title, justify="left" if title == "becomes" else "right")
    for index, need in found.layers.items():
        needs = [-math.inf if math.isnan(head) else head for head in found.heads[index]]
        strongest = f"{needs.index(max(needs))} ({max(needs):.3f})"
        own = [str(head) for layer, head in heads if layer == index]
        becomes = f"{options.student}, but for {', '.join(own)}" if own else options.student
        table.add_row(str(index), f"{need:.3f}", strongest, "stays" if index in kept else becomes)
    console.print(table)
    named = ",".join(f"{layer}.{head}" for layer, head in heads)
    write_lines(f'--pattern "{pattern}"' + (f" --heads {named}" if named else ""))


def _linearize(options: LinearizeArgs, words: Sequence[str], transfer: Sequence[str], tune: Sequence[str]) -> int | None:
    from plait.train.convert.linearize.linearizing import linearize
    from plait.train.convert.reshapes.linearize import Linearize
    from plait.train.remote.reading import run_here

    how = Linearize(pattern=options.pattern, heads=options.heads, window_size=options.window_size)
    found = linearize(run_here(options.run), options.new, how, words, transfer, tune)
    if found is None:
        console.print("stopped and saved; the same line goes on", markup=False)
        return 0
    table = Table(title=f"{options.run} as {options.pattern}, on what {options.new / 'tuned'} held out")
    for title in ("model", "loss (nats/token)", "perplexity"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, loss in found.losses.items():
        table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):.2f}")
    console.print(table)
    work = "; ".join(f"{name}: {found.trained[name]:,} parameters, {found.tokens[name]:,} tokens" for name in found.trained)
    console.print(f"{found.closed:.1%} of what copying loses is made up for. {work}", markup=False)
    console.print(f"report: {options.new / 'report' / 'index.html'}", markup=False)
    return 0
