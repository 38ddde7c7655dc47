"""The model's config: what it accepts, says and refuses."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from plait.configs.codec import decode, encode
from plait.configs.components import ConfigError, Table, unchecked, validate
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig, default_mixer
from plait.models.lm import LM, num_params
from plait.models.mixers.base import MIXERS, MixerConfig, register
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.retnet import RetNetConfig
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.models.positions.alibi import ALiBiConfig

SMALL = {"d_model": 64, "num_layers": 4, "vocab_size": 128}


def lm(**options) -> LMConfig:
    return LMConfig(**{"pattern": "gla,softmax", **SMALL, **options})


def test_names_left_out_get_their_defaults():
    config = lm(mixers={"gla": GLAConfig(num_heads=2)})
    assert config.mixers == {"gla": GLAConfig(num_heads=2), "softmax": SoftmaxConfig()}
    assert config.layer_mixers == (config.mixers["gla"], config.mixers["softmax"]) * 2
    assert default_mixer("moh+gla/wide") == MoHConfig(mixer=GLAConfig())


def test_labels_tell_configs_of_one_mixer_apart():
    local = SoftmaxConfig(window_size=8)
    config = lm(pattern="softmax/local*3,softmax", mixers={"softmax/local": local})
    assert config.layer_mixers == (local, local, local, SoftmaxConfig())


def test_equal_configs_are_equal_and_hash_alike():
    one, two = lm(mixers={"gla": GLAConfig()}), lm()
    assert one == two
    assert hash(one) == hash(two)
    assert one != lm(mixers={"gla": GLAConfig(num_heads=2)})
    assert len({one, two, lm(tie_embeddings=True)}) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.__setitem__("gla", GLAConfig()),
        lambda t: t.pop("gla"),
        lambda t: t.update(gla=GLAConfig()),
        lambda t: t.clear(),
        lambda t: t.__ior__({"softmax": SoftmaxConfig(head_dim=8)}),
    ],
    ids=["set", "pop", "update", "clear", "in-place-or"],
)
def test_mixer_table_is_final(change):
    table = Table({"gla": GLAConfig()})
    with pytest.raises(TypeError, match=r"dataclasses\.replace"):
        change(table)


def test_config_survives_json():
    config = lm(pattern="moh+gla,softmax/local", mixers={"softmax/local": SoftmaxConfig(window_size=8)}, logit_soft_cap=30.0)
    again = decode(LMConfig, json.loads(json.dumps(encode(config))))
    assert again == config
    assert hash(again) == hash(config)


def test_unknown_field_in_json_names_path_and_nearest():
    tree = encode(lm())
    tree["mixers"]["gla"]["num_head"] = 3
    with pytest.raises(ConfigError, match=r"mixers\.gla\.num_head is not a field of GLAConfig; did you mean 'num_heads'"):
        decode(LMConfig, tree)


def test_with_pattern_keeps_configs_of_names_that_stay():
    config = lm(mixers={"gla": GLAConfig(num_heads=2)}).with_pattern("gla*2,retnet", num_layers=6)
    assert config.num_layers == 6
    assert set(config.mixers) == {"gla", "retnet"}
    assert config.mixers["retnet"] == RetNetConfig()
    assert config.mixers["gla"] == GLAConfig(num_heads=2)


def test_with_vocab_settles_the_vocabulary():
    assert lm(vocab_size=None).with_vocab(300).vocab_size == 384
    assert lm(vocab_size=500).with_vocab(300).vocab_size == 500
    with pytest.raises(ValueError, match=r"model\.vocab_size=200 is smaller than the data's 300; leave it None or raise it"):
        lm(vocab_size=200).with_vocab(300)
    with pytest.raises(ValueError, match=r"model\.vocab_size=None must be settled .* LMConfig\.with_vocab"):
        LM(lm(vocab_size=None), rngs=nnx.Rngs(0), seq_len=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: lm(d_model=0), r"model\.d_model=0 must be a whole number from 1", id="d_model"),
        pytest.param(lambda: lm(num_layers=0), r"model\.num_layers=0 must be a whole number from 1", id="num_layers"),
        pytest.param(
            lambda: lm(vocab_size=-1),
            r"model\.vocab_size=-1 must be a whole number from 1 to 2097152; use None",
            id="vocab_size",
        ),
        pytest.param(
            lambda: lm(logit_soft_cap=0.0),
            r"model\.logit_soft_cap=0\.0 must be a finite number above 0 .*; use None",
            id="logit_soft_cap",
        ),
        pytest.param(
            lambda: lm(z_loss=-1e-4), r"model\.z_loss=-0\.0001 must be a finite number above 0 .*; use None", id="z_loss"
        ),
        pytest.param(
            lambda: lm(mixers={"retnet": RetNetConfig()}),
            r"model\.mixers\.retnet is in no layer of pattern='gla,softmax'; remove it",
            id="unused-mixer",
        ),
        pytest.param(
            lambda: lm(mixers={"gla": SoftmaxConfig()}),
            r"model\.mixers\.gla is a SoftmaxConfig; it must be a GLAConfig",
            id="other-mixer",
        ),
        pytest.param(
            lambda: lm(pattern="moh+gla", mixers={"moh+gla": MoHConfig()}),
            r"model\.mixers\.moh\+gla is a MoHConfig around a SoftmaxConfig; it must be a MoHConfig around a GLAConfig",
            id="other-wrapped-mixer",
        ),
        pytest.param(
            lambda: lm(pattern="sofmax"), "mixer 'sofmax' is not registered; did you mean 'softmax'", id="unknown-mixer"
        ),
        pytest.param(
            lambda: lm(pattern="gated_deltanet"),
            r"model\.mixers\.gated_deltanet\.head_dim=256 is too wide for 3/4 of d_model=64; set",
            id="wide-heads",
        ),
        pytest.param(
            lambda: lm(pattern="softmax", d_model=100),
            r"model\.mixers\.softmax\.head_dim=64 must divide d_model=100 when num_heads is None; set",
            id="width-not-divided",
        ),
        pytest.param(
            lambda: lm(pattern="moh+softmax"), r"mixer=softmax has one head, which leaves nothing to choose", id="one-head-routed"
        ),
        pytest.param(
            lambda: GatedMLPConfig(hidden_dim=0),
            r"gated_mlp\.hidden_dim=0 must be a whole number from 1 to 1048576; use None",
            id="hidden_dim",
        ),
        pytest.param(lambda: SoftmaxConfig(num_heads=0), r"^softmax\.num_heads=0 must be a whole number from 1", id="num_heads"),
        pytest.param(
            lambda: SoftmaxConfig(num_heads=8, num_kv_heads=3).heads(64),
            r"num_kv_heads=3 must divide num_heads=8; use one of 1, 2, 4, 8",
            id="kv-heads",
        ),
        pytest.param(lambda: SoftmaxConfig(num_sink_tokens=2), r"num_sink_tokens=2 needs a window", id="sinks-without-window"),
        pytest.param(
            lambda: SoftmaxConfig(num_sink_tokens=-1), r"num_sink_tokens=-1 must be a whole number from 0", id="negative-sinks"
        ),
        pytest.param(
            lambda: SoftmaxConfig(head_dim=7),
            r"^softmax\.positions\.fraction=1\.0 turns 7 channels of 7 and they are turned in pairs; use another, an even head dim",
            id="odd-rotary",
        ),
        pytest.param(lambda: SoftmaxConfig(scale=0.0), r"^softmax\.scale=0\.0 must be a finite number above 0", id="scale"),
        pytest.param(
            lambda: SoftmaxConfig(sink_bias="k", normalizer="sigmoid"),
            r"sink_bias='k' needs normalizer='softmax'",
            id="key-sigmoid",
        ),
        pytest.param(
            lambda: SoftmaxConfig(sink_bias="kv", shared_kv="write"),
            r"sink_bias='kv' changes values, which shared_kv='write' shares",
            id="shared-values",
        ),
        pytest.param(
            lambda: lm(positions=ALiBiConfig()),
            r"^model\.positions='alibi' acts on the logits of attention",
            id="embedding-positions",
        ),
        pytest.param(
            lambda: SoftmaxConfig(sink_logits=True, normalizer="sigmoid"),
            r"sink_logits=True needs normalizer='softmax'",
            id="sigmoid-sinks",
        ),
        pytest.param(
            lambda: lm(mixers={"gla": GLAConfig(num_heads=5)}),
            r"model\.mixers\.gla\.num_heads=5 must divide expand_k \* d_model=32; use one of",
            id="gla-heads",
        ),
        pytest.param(
            lambda: GLAConfig(gate_normalizer=0.0), r"gate_normalizer=0\.0 must be a finite number above 0", id="gate_normalizer"
        ),
        pytest.param(
            lambda: GatedDeltaNetConfig(num_heads=3, num_v_heads=4).heads(64),
            r"num_heads=3 must divide num_v_heads=4; use one of 1, 2, 4",
            id="value-heads",
        ),
        pytest.param(
            lambda: GatedDeltaNetConfig(head_dim=2, expand_v=0.1),
            r"expand_v=0\.1 must leave at least one of head_dim=2 channels",
            id="expand_v",
        ),
        pytest.param(
            lambda: RetNetConfig(num_heads=3).dims(64),
            r"num_heads=3 must divide d_model / 2=32; use one of 1, 2, 4",
            id="odd-retnet-heads",
        ),
    ],
)
def test_bad_value_is_refused_with_path_value_rule_and_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def carry(*patterns: str, **mixers: dict) -> LMConfig:
    softmax = lambda options: SoftmaxConfig(num_heads=4, head_dim=16, **options)
    table = {f"softmax/{name}": softmax(options) for name, options in mixers.items()}
    return lm(pattern=",".join(patterns), mixers=table)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: carry("softmax/a", "softmax/b", a={"shared_kv": "read"}, b={"shared_kv": "write"}),
            r"model\.mixers\.softmax/a reads the carry 'kv', which no layer before it writes; put a layer that does before it",
            id="nobody-writes",
        ),
        pytest.param(
            lambda: carry("softmax/a", "softmax/b", a={"shared_kv": "write"}, b={"shared_kv": "write"}),
            r"model\.mixers\.softmax/b and mixers\.softmax/a both write the carry 'kv'; let one of them write and the other read",
            id="two-write",
        ),
        pytest.param(
            lambda: lm(
                pattern="parallel",
                mixers={"parallel": ParallelConfig(parts=(SoftmaxConfig(num_heads=4, head_dim=16, shared_kv="write"),) * 2)},
            ),
            r"model\.mixers\.parallel writes the carry 'kv' in two of its parts; let one of them write it",
            id="two-parts-write",
        ),
        pytest.param(
            lambda: lm(pattern="moh+parallel", mixers={"moh+parallel": MoHConfig(mixer=ParallelConfig.example())}),
            r"model\.mixers\.moh\+parallel\.mixer=parallel has no head outputs to route; wrap a multi-head mixer",
            id="no-heads",
        ),
        pytest.param(
            lambda: carry("softmax/a", "softmax/b", a={"shared_kv": "write"}, b={"shared_kv": "read", "num_kv_heads": 2}),
            r"model\.mixers\.softmax/b has the carry 'kv' in shape \(2, 16\), and mixers\.softmax/a writes \(4, 16\); give both",
            id="another-shape",
        ),
        pytest.param(
            lambda: carry("softmax/a", "softmax/b", a={"value_residual": True}, b={"value_residual": True, "num_kv_heads": 1}),
            r"model\.mixers\.softmax/b has the carry 'values' in shape \(1, 16\)",
            id="values-of-another-shape",
        ),
        pytest.param(
            lambda: SoftmaxConfig(shared_kv="read", value_residual=True),
            "value_residual=True has no values to add to where shared_kv='read'",
            id="reads-and-mixes",
        ),
    ],
)
def test_carry_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_message_begins_with_the_path_of_whoever_holds_the_config():
    with unchecked():
        config = lm(mixers={"softmax": SoftmaxConfig(num_heads=0)}, channel_mixer=GatedMLPConfig(hidden_dim=24))
        wide = lm(channel_mixer=GatedMLPConfig(hidden_dim=0))
        nested = lm(pattern="moh+gla/a", mixers={"moh+gla/a": MoHConfig(mixer=GLAConfig(num_heads=0))})
    with pytest.raises(ConfigError, match=r"^model\.mixers\.softmax\.num_heads=0 must be a whole number from 1"):
        validate(config, "model")
    with pytest.raises(ConfigError, match=r"^model\.channel_mixer\.hidden_dim=0 must be a whole number from 1"):
        validate(wide, "model")
    with pytest.raises(ConfigError, match=r"^model\.mixers\.moh\+gla/a\.mixer\.num_heads=0 must be a whole number from 1"):
        validate(nested, "model")


def test_unknown_mixer_names_the_nearest():
    with pytest.raises(ValueError, match=r"mixer 'gatd_deltanet' is not registered; did you mean 'gated_deltanet'.*list mixers"):
        MIXERS["gatd_deltanet"]


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="mixer 'gla' is registered twice"):
        register("gla", kind="linear", source="none")(SoftmaxConfig)


@pytest.mark.parametrize("name", MIXERS.all())
def test_every_mixer_says_what_it_is(name):
    config = MIXERS.all()[name]
    assert config.name == name
    assert config.example().kind in ("full", "linear", "sparse", "parallel")
    assert config.source.endswith(")")
    assert config.__doc__
    assert issubclass(config, MixerConfig)
    assert dataclasses.is_dataclass(config)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_num_params_counts_the_built_model(tie_embeddings):
    config = lm(tie_embeddings=tie_embeddings, channel_mixer=GatedMLPConfig(hidden_dim=48))
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0), seq_len=8))
    assert num_params(config) == sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    body = sum(m.num_params(64) for m in config.layer_mixers) + 4 * (3 * 64 * 48 + 2 * 64)
    assert num_params(config) == body + 64 + 128 * 64 * (1 if tie_embeddings else 2)


def test_flops_add_up():
    config = lm(channel_mixer=GatedMLPConfig(hidden_dim=48))
    mixers = sum(m.flops(64, 32) for m in config.layer_mixers)
    assert config.flops(32) == mixers + 4 * 6 * 64 * 48 + 2 * 64 * 128


def test_channel_mixers_of_some_layers_are_others_or_none():

    dense = GatedMLPConfig(hidden_dim=8)
    model = LMConfig(
        d_model=16,
        num_layers=3,
        pattern="softmax/first@0; softmax",
        channel_mixer=None,
        mixers={name: SoftmaxConfig(num_heads=2, head_dim=8) for name in ("softmax/first", "softmax")},
        channel_mixers={"softmax/first": dense},
        vocab_size=8,
    )
    without = dataclasses.replace(model, channel_mixer=dense, channel_mixers={"softmax": None})
    assert num_params(without) == num_params(model) and decode(LMConfig, json.loads(json.dumps(encode(without)))) == without
    plain = dataclasses.replace(model, channel_mixers={})
    assert num_params(model) - num_params(plain) == dense.num_params(16) + 16  # and its norm
    assert model.flops(4) - plain.flops(4) == dense.flops(16)
    assert decode(LMConfig, json.loads(json.dumps(encode(model)))) == model
    with pytest.raises(ValueError, match=r"channel_mixers.gla is in no layer of pattern='softmax'; remove it or name it"):
        LMConfig(d_model=64, num_layers=1, pattern="softmax", channel_mixers={"gla": dense}, vocab_size=8)
