"""The JSON form of a config: exact round trips, and one clear sentence for everything that does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from plait.configs import codec
from plait.configs.components import Component, Config, ConfigError, registry_of
from plait.configs.experiment import ExperimentConfig
from plait.configs.listing import KINDS, registry
from plait.configs.presets import preset, presets
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.moh import MoHConfig
from plait.tests.configs.gadgets.base import GADGETS, GadgetConfig
from plait.tests.configs.gadgets.deeper.winch import WinchConfig
from plait.tests.configs.gadgets.lever import LeverConfig, LongLeverConfig


def without(tree, path):
    head, _, rest = path.partition(".")
    return {k: (without(v, rest) if k == head else v) for k, v in tree.items() if k != head or rest}


def put(tree, path, value):
    head, _, rest = path.partition(".")
    if isinstance(tree, list):
        return [put(item, rest, value) if index == int(head) else item for index, item in enumerate(tree)]
    return {**tree, head: put(tree[head], rest, value) if rest else value}


@pytest.mark.parametrize("name", presets())
def test_presets_survive_json(name, tmp_path):
    config = preset(name)
    assert codec.decode(ExperimentConfig, json.loads(json.dumps(codec.encode(config)))) == config
    codec.save(config, tmp_path / "config.json")
    loaded = codec.load(ExperimentConfig, tmp_path / "config.json")
    assert loaded == config and hash(loaded) == hash(config)
    assert codec.differences(codec.encode(config), codec.encode(loaded)) == []


def test_nested_mixers_and_labels_survive_json():
    model = preset("lm_tiny").model
    wide = dataclasses.replace(model, d_model=1024).with_pattern("softmax/local,moh+gated_deltanet", 4)
    config = dataclasses.replace(preset("lm_tiny"), model=dataclasses.replace(wide, mixers={}))
    encoded = codec.encode(config)
    assert encoded["model"]["mixers"]["moh+gated_deltanet"]["mixer"]["mixer_name"] == "gated_deltanet"
    assert codec.decode(ExperimentConfig, encoded) == config


WRONG = {
    # path, value put there: words of the message
    "unknown key with a near name": (
        "model.num_layer",
        3,
        ["config.model.num_layer is not a field", "did you mean 'num_layers'?"],
    ),
    "unknown key with no near name": (
        "mesh.zzz",
        1,
        ["config.mesh.zzz is not a field of MeshConfig", "it has pipeline, data, fsdp"],
    ),
    "unknown key of a mixer": (
        "model.mixers.softmax.head_dims",
        8,
        ["config.model.mixers.softmax.head_dims is not a field of SoftmaxConfig", "'head_dim'"],
    ),
    "text for a number": ("optimizer.b1", "0.9", ["config.optimizer.b1='0.9' must be of type float, not str; use 0.9"]),
    "fraction for a whole number": ("steps", 1.5, ["config.steps=1.5 must be of type int, not float; use 1"]),
    "truth value for a number": ("seed", True, ["config.seed=True must be of type int, not bool; use 0"]),
    "number for a truth value": ("resume", 1, ["config.resume=1 must be of type bool, not int; use False"]),
    "truth value for a fraction": ("optimizer.b2", False, ["config.optimizer.b2=False must be of type float, not bool"]),
    "null where there is no off": ("model.d_model", None, ["config.model.d_model=None must be of type int"]),
    "number for an object": ("model", 3, ["config.model=3 must be an object"]),
    "list for an object": ("data", [1], ["config.data=[1] must be an object"]),
    "name that is none of the choices": (
        "optimizer.schedule",
        "cosin",
        ["config.optimizer.schedule='cosin' must be one of 'cosine', 'wsd', 'constant'", "did you mean 'cosine'?"],
    ),
    "choice of an optional": ("model.remat", "ful", ["config.model.remat='ful' must be one of 'full', 'dots'", "'full'"]),
    "unknown mixer": (
        "model.mixers.softmax.mixer_name",
        "softmx",
        ["config.model.mixers.softmax: mixer 'softmx' is not registered", "did you mean 'softmax'"],
    ),
    "value out of range": (
        "optimizer.learning_rate",
        -1.0,
        ["config.optimizer.learning_rate=-1.0 must be a finite number above 0"],
    ),
    "value of a mixer out of range": (
        "model.mixers.softmax.num_heads",
        0,
        ["config.model.mixers.softmax.num_heads=0 must be a whole number from 1"],
    ),
    "value of the width of a channel mixer": (
        "model.channel_mixer.hidden_dim",
        -4,
        ["config.model.channel_mixer.hidden_dim=-4 must be a whole number from 1"],
    ),
    "mixer that does not fit the width": (
        "model.mixers.softmax.num_kv_heads",
        3,
        ["config.model.mixers.softmax.num_kv_heads=3 must divide num_heads=2"],
    ),
    "pattern of an unknown mixer": (
        "model.pattern",
        "gated_deltanet,sofmax",
        ["config.model.pattern='gated_deltanet,sofmax': mixer 'sofmax' is not registered", "did you mean 'softmax'?"],
    ),
    "channel mixer where a mixer belongs": (
        "model.mixers.softmax",
        {"channel_mixer_name": "gated_mlp"},
        ["config.model.mixers.softmax is the channel mixer 'gated_mlp'; it must be a mixer"],
    ),
    "mixer where a channel mixer belongs": (
        "model.channel_mixer",
        {"mixer_name": "gla"},
        ["config.model.channel_mixer is the mixer 'gla'; it must be a channel mixer"],
    ),
    "name that is no text": (
        "model.channel_mixer.channel_mixer_name",
        3,
        ["config.model.channel_mixer.channel_mixer_name=3 must be the name of a channel mixer"],
    ),
    "unknown channel mixer": (
        "model.channel_mixer.channel_mixer_name",
        "gated_mpl",
        ["config.model.channel_mixer: channel mixer 'gated_mpl' is not registered; did you mean 'gated_mlp'?"],
    ),
    "fields that do not fit each other": ("optimizer.accumulate", 3, ["accumulate=3 must divide data.batch_size=8"]),
    "mixer that is not the one named": (
        "model.mixers.softmax",
        {"mixer_name": "gla"},
        ["model.mixers.softmax is a GLAConfig; it must be a SoftmaxConfig"],
    ),
}


@pytest.mark.parametrize(("path", "value", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(path, value, words, tmp_path):
    tree = put(codec.encode(preset("lm_tiny")), path, value)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as error:
        codec.load(ExperimentConfig, file)
    message = str(error.value)
    assert message.startswith(str(file)) and all(word in message for word in words), message


@pytest.mark.parametrize("path", ["name", "steps", "model", "data", "model.d_model", "model.pattern"])
def test_missing_field_is_named(path):
    with pytest.raises(ConfigError, match=rf"config\.{path} is missing"):
        codec.decode(ExperimentConfig, without(codec.encode(preset("lm_tiny")), path))


def test_missing_mixer_name_is_named():
    tree = without(codec.encode(preset("lm_tiny")), "model.mixers.softmax.mixer_name")
    with pytest.raises(ConfigError, match=r"config.model.mixers.softmax has no 'mixer_name'"):
        codec.decode(ExperimentConfig, tree)


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("model.mixers.softmax/local.num_heads", "must be a whole number from 1"),
        ("model.mixers.moh+gla.mixer.num_heads", "must be a whole number from 1"),
        ("model.mixers.parallel.parts.1.state_dim", "must be a whole number from 1"),
    ],
)
def test_labels_wrappers_and_parts_are_in_the_path_of_a_bad_value(path, rule):
    config = preset("lm_tiny")
    model = dataclasses.replace(config.model, d_model=256, num_layers=3, pattern="softmax/local,moh+gla,parallel", mixers={})
    encoded = codec.encode(dataclasses.replace(config, model=model))
    with pytest.raises(ConfigError, match=f"^config.{re.escape(path)}=0 {rule}"):
        codec.decode(ExperimentConfig, put(encoded, path, 0))


def test_files_from_before_every_kind_had_its_name_are_read():
    """Only mixers had one; the rest is what the field holds by default."""
    encoded = codec.encode(preset("lm_tiny"))
    assert encoded["model"]["channel_mixer"]["channel_mixer_name"] == "gated_mlp"
    old = without(encoded, "model.channel_mixer.channel_mixer_name")
    assert codec.decode(ExperimentConfig, old) == preset("lm_tiny")
    wrong = put(old, "model.channel_mixer.hiden_dim", 3)
    with pytest.raises(
        ConfigError, match=r"config.model.channel_mixer.hiden_dim is not a field of GatedMLPConfig; did you mean 'hidden_dim'"
    ):
        codec.decode(ExperimentConfig, wrong)


def read_back(config, schema=None):
    return codec.decode(schema or type(config), json.loads(json.dumps(codec.encode(config))))


LEVER, LONG = LeverConfig(arm=0.5, wood="ash", bolts=(), pair=("right", False)), LongLeverConfig(size=3)
HOLDERS = {
    "the base of the kind": {"main": LONG},
    "its own class": {"exact": LEVER},
    "a registered class under it": {"exact": LONG},
    "optional": {"spare": WinchConfig(spare=LEVER)},
    "tuple": {"parts": (LEVER, WinchConfig(parts=(LONG,)), LONG)},
    "tuple of two kinds": {"both": (LEVER, MoHConfig(mixer=GLAConfig()))},
    "mapping": {"named": {"a/b+c": LONG, "d": WinchConfig(named={"e": LEVER})}},
    "anything": {"anything": LEVER},
    "anything in anything": {"anything": {"a": (1, None, "text", GLAConfig(num_heads=2)), "b": {"c": LEVER}, "d": 1.5}},
}


@pytest.mark.parametrize("fields", HOLDERS.values(), ids=HOLDERS)
def test_a_component_is_read_back_whatever_holds_it(fields):
    config = WinchConfig(**fields)
    assert read_back(config) == read_back(config, GadgetConfig) == read_back(config, Any) == config


NOT_GADGETS = {
    "untagged where any of a kind may be": (
        {"parts": [{"size": 1}]},
        r"x\.parts\.0 has no 'gadget_name'; it must name the gadget it configures",
    ),
    "another class than the field's": (
        {"exact": {"gadget_name": "winch"}},
        r"x\.exact is the gadget 'winch'; it must be the gadget 'lever'",
    ),
    "another kind": ({"main": {"mixer_name": "gla"}}, r"x\.main is the mixer 'gla'; it must be a gadget"),
    "another kind in a tuple": (
        {"both": [{"gadget_name": "lever"}] * 2},
        r"x\.both\.1 is the gadget 'lever'; it must be a mixer",
    ),
    "too few in a tuple": ({"both": [{"gadget_name": "lever"}]}, r"x\.both has 1 entries; it must have 2"),
    "no list": ({"parts": {"0": {}}}, r"x\.parts=\{'0': \{\}\} must be a list"),
    "unknown in anything": (
        {"anything": {"gadget_name": "levr"}},
        r"x\.anything: gadget 'levr' is not registered; did you mean 'lever'",
    ),
    "bad value in a mapping": (
        {"named": {"a/b": {"gadget_name": "lever", "size": 0}}},
        r"x\.named\.a/b\.size=0 must be at least 1",
    ),
    "bad value in anything": ({"anything": {"gadget_name": "lever", "size": 0}}, r"x\.anything\.size=0 must be at least 1"),
    "entry of another type": (
        {"main": {"gadget_name": "lever", "bolts": [1, "2"]}},
        r"x\.main\.bolts\.1='2' must be of type int, not str",
    ),
}


@pytest.mark.parametrize(("fields", "message"), NOT_GADGETS.values(), ids=NOT_GADGETS)
def test_what_is_no_such_component_is_named(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        codec.decode(WinchConfig, fields, "x")


class Stranger(LeverConfig):
    """Inherits the name of a registered class, and is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loose(Config):
    """Annotated more narrowly than what it is given."""

    numbers: tuple[int, ...] = ()
    inner: Config | None = None


UNREADABLE = {
    "class that is not registered": (
        WinchConfig(parts=(LEVER, Stranger())),
        r"config\.parts\.1 is a Stranger, which could not be read back; register",
    ),
    "no JSON": (WinchConfig(anything={"a": {1, 2}}), r"config\.anything\.a=\{1, 2\} has no JSON form"),
    "text in a tuple of numbers": (Loose(numbers=("1",)), r"config\.numbers\.0='1' must be of type int"),  # type: ignore[arg-type]
    "config that only its class tells": (
        WinchConfig(anything=Loose()),
        r"config\.anything would be read back otherwise; annotate",
    ),
}


@pytest.mark.parametrize(("config", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_could_not_be_read_back_is_not_saved(config, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^{message}"):
        codec.save(config, tmp_path / "config.json")
    assert list(tmp_path.iterdir()) == []


def components():
    """Every registered component, with a name for its case."""
    found = [one for kind in KINDS for one in registry(kind).all().values()]
    return [pytest.param(one, id=f"{one.kind_of_component} {one.name}") for one in [*found, *GADGETS.all().values()]]


def values(hint: Any, now: Any, depth: int) -> st.SearchStrategy[Any]:
    """Values of a field's annotation, components at most `depth` deep among them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(st.none() if one is type(None) else values(one, now, depth) for one in args))
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        parts = [values(one, None, depth - 1) for one in args if one is not ...]
        return st.tuples(*parts) if ... not in args else st.lists(parts[0], max_size=2).map(tuple)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return st.dictionaries(st.sampled_from(["a", "b/c", "d+e"]), values(args[1], None, depth - 1), max_size=2)
    if isinstance(hint, type) and issubclass(hint, Component) and (kind := registry_of(hint)) is not None:
        classes = [one for one in kind.all().values() if issubclass(one, hint)]
        return st.sampled_from(classes).flatmap(lambda one: configs(one, depth - 1) if depth > 0 else st.just(one()))
    if hint is Any:
        return st.one_of(st.none(), st.integers(), st.text(), values(MixerConfig, None, depth - 1))
    plain = {bool: st.booleans(), int: st.integers(1, 64), float: st.floats(0.015625, 64) | st.integers(1, 9), str: st.text()}
    return plain.get(hint, st.just(now))


@st.composite
def configs(draw, schema: type, depth: int = 1) -> Any:
    """Valid configs of a class, each field changed where the change is valid."""
    config, hints = schema(), typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        now = getattr(config, field.name)
        try:
            config = dataclasses.replace(config, **{field.name: draw(values(hints[field.name], now, depth))})
        except ValueError:
            continue
    return config


@pytest.mark.parametrize("schema", components())
@settings(
    max_examples=20,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(data=st.data())
def test_whatever_can_be_saved_can_be_loaded(schema, data):
    config = data.draw(configs(schema))
    assert read_back(config) == config
    assert read_back(WinchConfig(anything=config, main=LONG)).anything == config


def test_fields_with_defaults_may_be_left_out_and_whole_numbers_are_fractions():
    tree = put(without(codec.encode(preset("lm_tiny")), "probe"), "optimizer.learning_rate", 1)
    config = codec.decode(ExperimentConfig, tree)
    assert config.probe == ExperimentConfig.__dataclass_fields__["probe"].default
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)


BROKEN = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not JSON": lambda text: "steps = 3",
    "a list": lambda text: "[]",
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_broken_file_is_one_clear_error(spoil, tmp_path):
    file = tmp_path / "config.json"
    codec.save(preset("lm_tiny"), file)
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ConfigError, match=r"is not JSON|must be an object") as error:
        codec.load(ExperimentConfig, file)
    assert str(file) in str(error.value)


def test_file_that_is_not_text_or_not_there(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="does not exist"):
        codec.load(ExperimentConfig, file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        codec.load(ExperimentConfig, file)


def test_differences_name_leaves_old_and_new():
    old = codec.encode(preset("lm_tiny"))
    new = put(put(old, "model.mixers.softmax.window_size", 8), "out", "runs/b")
    assert codec.differences(old, new) == ["model.mixers.softmax.window_size: null -> 8", 'out: null -> "runs/b"']
    assert codec.differences({"a": [1, {"b": 2}], "c": []}, {"a": [1, {"b": 3}, 4], "c": {}}) == [
        "a.1.b: 2 -> 3",
        "a.2: null -> 4",
        "c: [] -> {}",
    ]
    assert codec.leaves({"a": [1, {"b": 2}], "c": None}) == {"a.0": 1, "a.1.b": 2, "c": None}
    gone = without(old, "model.mixers.softmax")
    assert codec.differences(old, gone)[0].startswith("model.mixers.softmax: {") and codec.differences(old, old) == []
