"""The documentation does what it says: its commands run, its links lead somewhere, its tables are those of the code.

Convention: a block fenced as `sh` holds commands that a reader may paste, one a line, from the root of the repository; `#`
starts a comment. Commands of the README are run as they stand, in a folder of their own, on the preset lm_tiny for two steps.
In the fast suite only the first training is run, the further ones are parsed and their run folders are copies of its; the slow
suite runs them all. Commands of the other pages are parsed. A block that shows output, a file or another program's command is
fenced otherwise.
"""

import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from plait import launch
from plait.configs.command_line.cli import parse_experiment
from plait.configs.command_line.exchange import take
from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse
from plait.configs.presets import presets
from plait.train.commands import convert, lm_eval
from plait.train.commands.evaluate import parse as parse_eval
from plait.train.commands.generate import GenerateArgs
from plait.train.commands.inspect_run import InspectArgs
from plait.train.commands.plan import PlanArgs
from plait.train.commands.prepare import PrepareArgs
from plait.train.commands.report import ReportArgs
from plait.train.commands.sweep import SweepArgs
from plait.train.commands.verify import VerifyArgs
from plait.train.pods.hosts.host import host_options
from plait.train.pods.plan.topology import parse_target
from plait.train.sweep.asked import asked_for

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
# What makes a command of the README small enough to run. Later options win over those of the command.
SMALL = [
    "--steps",
    "2",
    "--optimizer.warmup-steps",
    "1",
    "--data.source",
    "corpus/",
    "--data.cache-dir",
    "cache",
    "--eval-batches",
    "1",
]


def commands(page: Path) -> list[str]:
    """The commands of a page's `sh` blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def arguments(command: str) -> list[str] | None:
    """The arguments of a `python launch.py` command, None for another program."""
    words = shlex.split(command, comments=True)
    return words[2:] if words[:2] == ["python", "launch.py"] else None


ALL_COMMANDS = [pytest.param(command, id=f"{page.stem}: {command}") for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_command_is_known_and_parses(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= MAKE_TARGETS, f"the Makefile has no target {targets}; it has {sorted(MAKE_TARGETS)}"
        return
    args = arguments(command)
    if args is None:
        script = ROOT / words[1] if words[0] == "python" and len(words) > 1 else None
        known = words[0] in ("git", "pre-commit", "pip", "tensorboard") or words[:3] == ["python", "-m", "pytest"]
        assert known or (script is not None and script.is_file()), (
            f"{command!r} is no command this test knows; fence it otherwise"
        )
        return
    name, rest = args[0], args[1:]
    if name == "train":
        if "--help" not in rest:
            alone = rest[0].startswith("-")  # its model is that of the run it begins with, which is not here
            start = dataclasses.replace(presets()["lm_tiny"](), init_from="runs/a") if alone else rest.pop(0)
            take("branch", rest)
            parse_experiment(start, host_options(rest)[1])
    elif name == "write-launch":
        from plait.train.pods import launch_files

        launch_files.prepare(rest)
    elif name == "sweep":
        mine, (preset, *overrides) = split_options(SweepArgs, rest)
        parse(SweepArgs, mine, prog="launch.py sweep")
        asked_for(preset, overrides, None)
    elif name == "plan":
        mine, (preset, *overrides) = split_options(PlanArgs, rest)
        options = parse(PlanArgs, mine, prog="launch.py plan")
        parse_experiment(preset, overrides)
        parse_target(options.target, options.slices)
    elif name in ("prepare", "verify"):
        options = {"prepare": PrepareArgs, "verify": VerifyArgs}[name]
        mine, overrides = split_options(options, rest)
        parse(options, mine, prog=f"launch.py {name}")
        preset = overrides.pop(0) if name == "prepare" else "lm_tiny"
        parse_experiment(preset, overrides)
    elif name == "list":
        from plait.configs import listing

        assert len(rest) == 1 and rest[0] in listing.TABLES
    elif name == "eval" and lm_eval.is_asked(rest):
        parse(lm_eval.LmEvalArgs, rest, prog="launch.py eval")
    elif name == "eval":
        parse_eval(rest)
    elif name == "convert":
        convert.parsed(host_options(rest)[1] if rest[0] in convert.ON_HOSTS else rest)
    else:
        parse({"generate": GenerateArgs, "report": ReportArgs, "inspect": InspectArgs}[name], rest, prog=f"launch.py {name}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, with a corpus; left again at the end. Programs are compiled quickly rather than well in it."""
    folder, before = tmp_path_factory.mktemp("readme"), Path.cwd()
    jax.config.update("jax_disable_most_optimizations", True)
    (folder / "corpus").mkdir()
    for number in range(12):
        words = [f"{(number * 7 + i * i) % 23} and {i % 5}" for i in range(60)]
        (folder / "corpus" / f"{number}.txt").write_text("Fellow citizens, " + ", ".join(words) + ".", "utf-8")
    os.chdir(folder)
    yield folder
    os.chdir(before)
    jax.config.update("jax_disable_most_optimizations", False)


def run(args: list[str]) -> None:
    assert launch.main(args) == 0, f"launch.py {shlex.join(args)} failed"


def small(args: list[str]) -> list[str]:
    """A training command on the preset lm_tiny, deep enough for its pattern, on one device unless it names a mesh."""
    extra = ["--model.num-layers", "4"] if "--model.pattern" in args else []
    extra += [] if any(word.startswith("--mesh") for word in args) else ["--mesh.data", "1"]
    return ["train", "lm_tiny", *args[2:], *SMALL, *extra]


def run_readme(place: Path, *, every_training: bool) -> None:
    trained: Path | None = None
    for command in commands(README):
        args = arguments(command)
        if args is None:
            continue
        if args[0] == "sweep":
            run([*args, *SMALL, "--mesh.data", "1"] if every_training else [*args, "--dry-run"])
            continue
        if args[0] != "train":
            run(args)
            continue
        out = place / parse_experiment("lm_tiny", small(args)[2:]).folder
        if every_training or trained is None:
            run(small(args))
            trained = out
        elif not out.exists():
            shutil.copytree(trained, out)
        assert (out / "report" / "index.html").is_file()
        assert (out / "metrics.jsonl").read_text("utf-8").count('"loss/val"') == 1


def test_readme_commands_run(place):
    run_readme(place, every_training=False)
    assert (place / "runs/compared/index.html").is_file()
    assert list((place / "runs/a").glob("eval_*.json"))


@pytest.mark.slow
def test_readme_commands_all_run(place):
    shutil.rmtree(place / "runs", ignore_errors=True)
    run_readme(place, every_training=True)


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in headings(file), f"{page.name} links to {target}, and {file.name} has no such heading"


def test_every_page_is_linked_from_the_readme():
    text = README.read_text("utf-8")
    missing = [page.name for page in PAGES if page != README and page.name not in text]
    assert not missing, f"link {missing} from README.md"


def test_generated_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    old = [page.relative_to(ROOT).as_posix() for page in tables.outdated()]
    assert not old, f"{', '.join(old)}: tables are out of date; run `{tables.COMMAND}` and commit what it changes"


def test_example_components_are_one_file_each_and_work(tmp_path):
    """The files of docs/adding-a-component.md, in a process of its own so that the registries here stay as they are."""
    page = (ROOT / "docs" / "adding-a-component.md").read_text("utf-8")
    files = re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(files) == page.count("```python"), "each example stands below the path of its file"
    for path, code in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code, "utf-8")
    use = tmp_path / "use.py"
    use.write_text(USE_EXAMPLES, "utf-8")
    command = [sys.executable, use, *(path for path, _ in files)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (
        f"an example of docs/adding-a-component.md no longer works:\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    )


USE_EXAMPLES = """
import importlib, pathlib, sys

for file in map(pathlib.Path, sys.argv[1:]):
    for folder in list(file.parents)[:-1]:
        package = importlib.import_module(".".join(("plait", *folder.parts)))
        if str(folder.absolute()) not in package.__path__:
            package.__path__.append(str(folder.absolute()))

import jax, jax.numpy as jnp
from flax import nnx
from plait.configs.command_line.cli import parse_experiment
from plait.configs.listing import registry
from plait.kernels import Tokens
from plait.launch import main
from plait.models.lm import LM
from plait.train.probes.base import Probes

jax.config.update("jax_disable_most_optimizations", True)
names = {"mixer": "fading", "channel mixer": "squared_relu", "optimizer": "lion", "task": "copying", "probe": "output_norm"}
names["sweep"] = "depth_or_width"
for kind, name in names.items():
    assert name in registry(kind), name
    assert main(["list", registry(kind).plural]) == 0

for pattern in ("fading*3,softmax", "moh+fading"):
    place = "--model.mixers." + pattern.split("*")[0] + (".mixer" if "+" in pattern else "")
    config = parse_experiment("lm_tiny", ["--model.pattern", pattern, "--model.num-layers", "4", place + ".head-dim", "16"])
    model = config.model.with_vocab(257)

    def use(ids):
        lm = LM(model, rngs=nnx.Rngs(0), seq_len=8)
        logits, extras = lm(Tokens(ids), observer=Probes(config.probe))
        _, state = lm.prefill(Tokens(ids), lm.init_state(2, 16))
        return logits, extras[0].statistics["decay_horizon"], lm.step(Tokens(ids[:, :1], positions=jnp.full((2, 1), 8)), state)[0]

    logits, horizon, step = jax.eval_shape(use, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    assert logits.shape == (2, 8, 384) and step.shape == (2, 384) and horizon.shape == (2,)

words = "--model.pattern fading,moh+fading --model.mixers.fading.head-dim 16 --model.mixers.moh+fading.mixer.head-dim 16"
words += " --model.channel-mixer squared_relu --model.channel-mixer.expand 2 --optimizer lion --optimizer.b1 0.8 --data.task copying"
words += " --steps 2 --optimizer.warmup-steps 1 --mesh.data 1 --data.task.val-rows 8 --out run"
words += " --probe-every 1 --probe.only output_norm,memory"
assert main(["train", "lm_tiny", *words.split()]) == 0
assert '"attn/output_norm"' in pathlib.Path("run/metrics.jsonl").read_text()
assert "Head output norm" in pathlib.Path("run/report/index.html").read_text()
preset = parse_experiment("recall_tiny", ["--optimizer", "lion"])
assert preset.optimizer.name == "lion" and preset.model.with_vocab(preset.data.task.vocabulary(preset.data)).vocab_size == 128
"""


@pytest.mark.parametrize("name", presets())
def test_preset_says_what_it_is(name):
    """Purpose in one line, then command, device and what to expect; a baseline may leave those to the preset it names."""
    known = presets()
    own = known[name].__doc__ or ""
    purpose = own.strip().splitlines()[0] if own.strip() else ""
    assert len(purpose) > 20, f"{name}: the first line must say what the preset is for"
    whole = own + "".join(known[other].__doc__ or "" for other in re.findall(r"`(\w+)`", own) if other in known)
    for word in ("Command:", "Device:", "Expected:"):
        assert word in whole, f"{name}: the docstring must have {word!r} (see configs/presets/lm.py)"
    (command,) = re.findall(r"`(python launch\.py train [^`]*)`", whole)
    args = arguments(command)
    assert args is not None and args[1] in known
    parse_experiment(args[1], args[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_names_no_machine(page):
    found = re.findall(r"(?<![\w.])/(?:home|root|work|tmp|Users)/\S*", page.read_text("utf-8"))
    assert not found, f"{page.name} names a path of some machine: {found}"
