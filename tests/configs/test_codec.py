"""The JSON form of a config: exact round trips, and one clear sentence for everything that does not fit."""

import dataclasses
import json

import pytest

from plait.configs import codec
from plait.configs.codec import ConfigError
from plait.configs.experiment import ExperimentConfig
from plait.configs.presets import preset, presets


def without(tree, path):
    head, _, rest = path.partition(".")
    return {k: (without(v, rest) if k == head else v) for k, v in tree.items() if k != head or rest}


def put(tree, path, value):
    head, _, rest = path.partition(".")
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
        ["config.mesh.zzz is not a field of MeshConfig", "it has pipeline, data, fsdp, context, tensor"],
    ),
    "axis of a later time": ("mesh.expert", 2, ["config.mesh.expert is kept for layers of experts", "leave it out"]),
    "unknown key of a mixer": (
        "model.mixers.softmax.head_dims",
        8,
        ["config.model.mixers.softmax.head_dims is not a field of SoftmaxConfig", "'head_dim'"],
    ),
    "text for a number": ("optimizer.b1", "0.9", ["config.optimizer.b1='0.9' must be of type float, not str"]),
    "fraction for a whole number": ("steps", 1.5, ["config.steps=1.5 must be of type int, not float"]),
    "truth value for a number": ("seed", True, ["config.seed=True must be of type int, not bool"]),
    "number for a truth value": ("resume", 1, ["config.resume=1 must be of type bool, not int"]),
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
    "value out of range": ("optimizer.learning_rate", -1.0, ["optimizer.learning_rate=-1.0 must be positive"]),
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
    gone = without(old, "model.mixers.softmax")
    assert codec.differences(old, gone)[0].startswith("model.mixers.softmax: {") and codec.differences(old, old) == []
