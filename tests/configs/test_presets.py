"""Every preset can be built, has the size its name says, and its training step can be traced."""

import dataclasses
import re

import jax
import pytest
from flax import nnx

from plait.configs.command_line.cli import parse_experiment
from plait.configs.presets import preset, presets
from plait.data.batch import Batch
from plait.models.lm import LM, num_params
from plait.models.mixers.base import WrapperConfig
from plait.tests.train.common import changed, program_of, random_batch
from plait.train.probes.base import Probes
from plait.train.step import make_step

SIZES = {"m": 1e6, "b": 1e9}


@pytest.fixture(params=presets())
def config(request):
    return preset(request.param)


def test_name_is_the_function(config):
    assert preset(config.name) == config


def test_docstring_holds_purpose_command_and_device_or_names_the_preset_it_is_the_baseline_of():
    for name, function in presets().items():
        text = function.__doc__ or ""
        assert len(text.splitlines()[0]) > 20, name
        like_another = any(f"`{other}`" in text for other in presets() if other != name)
        assert like_another or ("Command:" in text and "Device:" in text), f"{name} names no command or device"


def test_builds_abstractly_with_the_size_its_name_says(config, record_property):
    model = config.model.with_vocab(config.data.vocab_size or 257)
    built = nnx.eval_shape(lambda: LM(model, rngs=nnx.Rngs(0), seq_len=config.data.seq_len))
    total = sum(p.size for p in jax.tree.leaves(nnx.state(built, nnx.Param)))
    assert total == num_params(model)
    idle = sum(one.num_params(model.d_model) - one.flops(model.d_model) / 2 for one in model.layer_channel_mixers)
    body = (
        total - idle - (0 if model.tie_embeddings else model.vocab_size * model.d_model)
    )  # activated, the embedding counted once
    print(f"{config.name}: {total / 1e6:,.1f}M parameters, {body / 1e6:,.1f}M activated, the embedding counted once")
    if named := re.search(r"_(\d+)([mb])\b", config.name):
        said = {"1b": 1.3e9}.get("".join(named.groups()), int(named[1]) * SIZES[named[2]])
        assert 0.85 * said < body < 1.15 * said


def test_step_can_be_traced_at_reduced_size(config):
    """Same options, dtypes and optimizer; narrow, short, and with one layer of each mixer."""
    mixers = {
        name: mixer if isinstance(mixer, WrapperConfig) else type(mixer).example() for name, mixer in config.model.mixers.items()
    }
    one_of_each = list(dict.fromkeys(config.model.layers))
    small = {
        "model.d_model": 64 if config.model.d_model > 200 else config.model.d_model,
        "model.mixers": mixers if config.model.d_model > 200 else dict(config.model.mixers),
        **({} if config.model.channel_mixer is None else {"model.channel_mixer.hidden_dim": 96}),
        "model.pattern": ",".join(one_of_each),
        "model.num_layers": max(len(one_of_each), 2),
        "model.vocab_size": 512,
        "data.seq_len": 32,
        "data.batch_size": 2 * config.optimizer.accumulate,
        "data.vocab_size": 300 if config.data.tokenizer == "bpe" else None,
        "mesh": dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
    }
    setup = program_of(changed(config, small))
    batch = random_batch(setup.config.data.batch_size, 32)
    abstract = Batch(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in batch))
    step = make_step(setup.blueprint, setup.tx, setup.mesh, Probes(config.probe))
    after, metrics = jax.eval_shape(step, setup.like, abstract)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), setup.like)
    assert len(metrics["statistics"]) == setup.config.model.num_layers


@pytest.mark.parametrize("ratio", [24, 12, 6, 3, None])
@pytest.mark.parametrize("name", ["hgrn", "hgrn2", "retnet", "gla", "deltanet", "gated_deltanet"])
def test_hybrid_study_is_one_preset_and_a_pattern(name, ratio):
    """The models of arXiv 2507.06457: six linear mixers, alone and with a softmax layer after every `ratio` of them, 24 layers."""
    pattern = name if ratio is None else f"softmax@23; {name}" if ratio == 24 else f"{name}*{ratio},softmax"
    model = parse_experiment("hybrid_340m", ["--model.pattern", pattern]).model
    assert model.layers.count("softmax") == {24: 1, 12: 1, 6: 3, 3: 6, None: 0}[ratio]
    assert 0.85 * 340e6 < num_params(model) - model.vocab_size * model.d_model < 1.4 * 340e6  # what the mixers' own widths leave
