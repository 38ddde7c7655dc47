"""Domains: every leaf has one, what lies in it is read back, and what does not is refused before anything is written."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from plait.configs import codec
from plait.configs.command_line.cli import parse_experiment
from plait.configs.command_line.words import flag
from plait.configs.components import Config, ConfigError, children
from plait.configs.domains import Domain, Number, Text, Whole, check_leaves, choices, divisors, domain_of, hints_of, shown
from plait.configs.experiment import ExperimentConfig
from plait.configs.listing import KINDS, registry
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import OptimizerConfig
from plait.configs.probe import ProbeConfig
from plait.configs.spike import SpikeConfig
from plait.configs.sweeps.search import SearchConfig
from plait.configs.sweeps.stopping import StopConfig
from plait.data.config import DataConfig
from plait.data.mixture.config import SourceConfig
from plait.launch import main
from plait.models.config import LMConfig
from plait.models.mixers.base import WrapperConfig
from plait.train.commands.evaluate import EvalArgs
from plait.train.commands.generate import GenerateArgs
from plait.train.commands.lm_eval import LmEvalArgs
from plait.train.commands.plan import PlanArgs
from plait.train.commands.prepare import PrepareArgs
from plait.train.commands.sweep import SweepArgs
from plait.train.commands.verify import VerifyArgs
from plait.train.pods.hosts.host import HostsOptions
from plait.train.pods.launch_files import KINDS as LAUNCH_FILES

SCHEMAS = [
    *(ExperimentConfig, LMConfig, DataConfig, OptimizerConfig, MeshConfig, ProbeConfig, SpikeConfig, StopConfig, SearchConfig),
    *(one for kind in KINDS for one in registry(kind).all().values()),
    *(SourceConfig, EvalArgs, LmEvalArgs, GenerateArgs, PlanArgs, PrepareArgs, SweepArgs, VerifyArgs, HostsOptions),
    *(kind.options for kind in LAUNCH_FILES.values()),
]
FREE = {"GenerateArgs.prompt", "LmEvalArgs.system"}
"""Texts that may be any."""


def plain_kinds(hint: Any) -> set[Any]:
    """Numbers and texts that an annotation leaves without a domain."""
    if typing.get_origin(hint) is Annotated:
        return set() if domain_of(hint) is not None else plain_kinds(typing.get_args(hint)[0])
    if typing.get_origin(hint) is typing.Literal:
        return set()
    args = typing.get_args(hint)[1:] if typing.get_origin(hint) is Mapping else typing.get_args(hint)
    return {hint} & {int, float, str} if not args else set().union(*map(plain_kinds, args))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda one: one.__name__)
def test_every_number_and_text_has_a_domain(schema):
    bare = [name for name, hint in hints_of(schema).items() if plain_kinds(hint) and f"{schema.__name__}.{name}" not in FREE]
    assert not bare, f"{schema.__name__}: give {bare} a domain of configs/domains.py in the annotation"


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda one: one.__name__)
def test_defaults_lie_in_their_domains(schema):
    for field in dataclasses.fields(schema):
        domain = domain_of(hints_of(schema)[field.name])
        if domain is not None and field.default not in (None, dataclasses.MISSING, ()):
            every = field.default if isinstance(field.default, tuple) else (field.default,)
            assert all(value in domain for value in every), field.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pot(Config):
    """With a leaf of every kind."""

    path = "pot"

    size: Annotated[int, Whole(2, 9)]
    heat: Annotated[float, Number(above=0, most=1)] = 0.5
    lid: Annotated[str, Text(4)] | None = None
    eyes: tuple[Annotated[int, Whole(0, 3)], ...] = ()


REFUSED = {
    "too small": ({"size": 1}, "pot.size=1 must be a whole number from 2 to 9; use 2"),
    "too large": ({"size": 10**5000}, "pot.size=a whole number of 16610 bits must be a whole number from 2 to 9; use 9"),
    "a truth value": ({"size": True}, "pot.size=True must be a whole number from 2 to 9; use 2"),
    "a fraction": ({"size": 2.5}, "pot.size=2.5 must be a whole number from 2 to 9; use 2"),
    "an end left out": ({"heat": 0}, "pot.heat=0 must be a finite number above 0 and at most 1; use 0.5"),
    "no number": ({"heat": math.nan}, "pot.heat=nan must be a finite number above 0 and at most 1; use 0.5"),
    "endless": ({"heat": math.inf}, "pot.heat=inf must be a finite number"),
    "blank": ({"lid": " "}, "pot.lid=' ' must be text that is not blank"),
    "a line end": ({"lid": "a\u2028b"}, "pot.lid='a\\u2028b' must be text that is not blank, without control characters"),
    "long": ({"lid": "a" * 500}, f"pot.lid='{'a' * 59}... must be text"),
    "none where there is no off": ({"heat": None}, "pot.heat=None must be a finite number"),
    "in a tuple": ({"eyes": (0, 4)}, "pot.eyes.1=4 must be a whole number from 0 to 3; use 3"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_in_the_domain_is_named_with_the_rule_and_a_fix(fields, message):
    with pytest.raises(ConfigError) as error:
        Pot(**{"size": 3, **fields})
    assert str(error.value).startswith(message)


def test_what_is_in_the_domain_passes():
    check_leaves(Pot(size=9, heat=1, lid=None, eyes=(0, 3)))


def test_divisors_and_choices():
    assert all(divisors(n) == [d for d in range(1, n + 1) if n % d == 0] for n in range(1, 200))
    assert len(divisors(2**40 * 3)) == 82
    assert choices([1, 2]) == "1, 2" and choices(range(100)).endswith("23, ...")
    assert shown("a" * 100).endswith("a...") and len(shown("a" * 100)) < 70


def encoder(mixer: Any) -> str:
    """What a model takes whose mixer cannot be causal."""
    return "" if "causal" in mixer.example().directions else " --model.no-causal --data.task mlm"


BASES = {
    **{
        name: f"--model.d-model 1024 --model.pattern {name}{encoder(mixer)}"
        for name, mixer in registry("mixer").all().items()
        if not issubclass(mixer, WrapperConfig)
    },
    "transfer": "--model.pattern transfer+lolcats,softmax/wide --model.d-model 128",
    "moh": "--model.pattern moh+softmax,softmax/wide --model.d-model 128",
    **{name: f"--model.channel-mixer {name}" for name in registry("channel mixer").all()},
    **{name: f"--optimizer {name} --optimizer.warmup-steps 3" for name in registry("optimizer").all()},
    **{name: f"--data.task {name} --data.seq-len 512" for name in registry("task").all()},
    "all that is optional": "--spike.sigma 9 --optimizer.ema 0.9 --model.z-loss 1e-4 --data.tokenizer bpe --data.vocab-size 300 "
    "--event.loss-spike.limit 9 --event.loss-spike.action lower_rate --model.qk-clip.threshold 100 --model.attention-loss.entropy 1e-3 "
    "--model.attention-loss.entropy-floor 1 --model.attention-loss.sharpness 1 "
    "--model.attention-loss.head-diversity 1 --model.attention-loss.head-balance 1 --model.dropout.heads 1",
}
"""Words that put each component into an experiment."""


@functools.cache
def base(name: str) -> ExperimentConfig:
    return parse_experiment("lm_tiny", [*BASES[name].split(), "--mesh.data", "1"])


def leaf_domains(config: Any, path: str = "") -> dict[str, Domain]:
    """The domain of each leaf of a config, by its dotted path."""
    found = {}
    for name, hint in hints_of(type(config)).items():
        if (domain := domain_of(hint)) is not None:
            found[path + name] = domain
    for name, child in children(config):
        found |= leaf_domains(child, f"{path}{name}.")
    return found


def inside(domain: Domain) -> st.SearchStrategy[Any]:
    if isinstance(domain, Whole):
        near = st.integers(domain.least, min(domain.most, domain.least + 70))
        return near | st.integers(domain.least, domain.most) | st.just(domain.most)
    if isinstance(domain, Number):
        low, high = max(domain.least, domain.above), min(domain.most, domain.below)
        between = st.floats(low, high).filter(lambda number: number in domain)
        return between | st.sampled_from([number for number in (low, high, 0.5, 1.0, 2.0) if number in domain])
    assert isinstance(domain, Text)
    return st.text(max_size=40).filter(lambda text: text in domain and text != "None")


def outside(domain: Domain) -> st.SearchStrategy[Any]:
    if isinstance(domain, Whole):
        far = st.sampled_from([10**20, 10**22, -(10**20), -1, 2**63, 2**31])
        return (far | st.integers(domain.most + 1) | st.integers(max_value=domain.least - 1)).filter(lambda n: n not in domain)
    if isinstance(domain, Number):
        far = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, 1e-300, -1e-300])
        return (far | st.floats()).filter(lambda number: number not in domain)
    assert isinstance(domain, Text)
    marks = st.sampled_from(["", " ", "\t", "a\nb", "\x1b[31m", "a\x85", "\u2028", "x" * 5000])
    return (marks | st.text(max_size=5)).filter(lambda text: text not in domain and "\0" not in text)


@st.composite
def leaf_and(draw: Any, values: Any) -> tuple[str, str, Any]:
    """An experiment, a leaf of it, and a value."""
    name = draw(st.sampled_from(list(BASES)))
    domains = leaf_domains(base(name))
    path = draw(st.sampled_from(list(domains)))
    return name, path, draw(values(domains[path]))


def put(tree: Any, path: str, value: Any) -> Any:
    head, _, rest = path.partition(".")
    if isinstance(tree, list):
        return [put(item, rest, value) if index == int(head) else item for index, item in enumerate(tree)]
    return {**tree, head: put(tree[head], rest, value) if rest else value}


def said(function: Any, *args: Any) -> tuple[Any, str]:
    """What a function returns, or None and what it refused with."""
    try:
        return function(*args), ""
    except ValueError as error:
        return None, str(error)


def fuzz(examples: int, values: Any) -> Any:
    def decorate(test: Any) -> Any:
        quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}
        return settings(max_examples=examples, derandomize=True, **quiet)(given(case=leaf_and(values))(test))

    return decorate


def check_inside(case: tuple[str, str, Any]) -> None:
    name, path, value = case
    config, refused = said(codec.decode, ExperimentConfig, put(codec.encode(base(name)), path, value))
    words = [
        *BASES[name].split(),
        "--mesh.data=1",
        f"{flag(path)}={value!r}" if not isinstance(value, str) else f"{flag(path)}={value}",
    ]
    if path != "model.pattern":  # which exchanges the mixers too
        typed, refused_typed = said(parse_experiment, "lm_tiny", words)
        assert typed == config and bool(refused) == bool(refused_typed), (case, refused, refused_typed)
    if config is None:
        assert re.match(r"config\.[\w.+/]+", refused) and ";" in refused, (case, refused)
    else:
        assert codec.decode(ExperimentConfig, json.loads(json.dumps(codec.encode(config)))) == config


def check_outside(case: tuple[str, str, Any]) -> None:
    name, path, value = case
    _, refused = said(codec.decode, ExperimentConfig, put(codec.encode(base(name)), path, value))
    assert re.match(rf"config\.{re.escape(path)}=.* must be .*; (use|did you mean) .", refused, re.DOTALL), (case, refused)
    folder = Path("run")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        words = [*BASES[name].split(), f"{flag(path)}={value}"]
        status = main(["train", "lm_tiny", "--out", str(folder), *words])
    line = errors.getvalue()
    where = rf"error: {re.escape(path)}(\.0)?="  # one value on the command line is the first of several
    assert status == 2 and re.match(where, line) and ";" in line and line.count("\n") == 1, (case, line)
    assert not folder.exists(), "nothing is written"


@fuzz(60, inside)
def test_values_inside_are_read_back_or_refused_by_what_they_must_go_with(case):
    check_inside(case)


@fuzz(150, outside)
def test_values_outside_are_refused_by_file_and_by_command_line(case, tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.getbasetemp()):
        check_outside(case)


@pytest.mark.slow
@fuzz(2000, inside)
def test_many_values_inside_are_read_back_or_refused_by_what_they_must_go_with(case):
    check_inside(case)


@pytest.mark.slow
@fuzz(5000, outside)
def test_many_values_outside_are_refused_by_file_and_by_command_line(case, tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.getbasetemp()):
        check_outside(case)


def test_an_outside_value_of_every_leaf_is_refused_in_one_line():
    """Each leaf that there is, once, through its file."""
    shown_already = set()
    for name in BASES:
        encoded = codec.encode(base(name))
        new = leaf_domains(base(name)).items() - shown_already
        shown_already |= new
        for path, domain in new:
            value = {Whole: 10**20, Number: math.nan, Text: "a\0b"}[type(domain)]
            _, refused = said(codec.decode, ExperimentConfig, put(encoded, path, value))
            assert refused.startswith(f"config.{path}=") and "; " in refused, refused
