"""A stranger's mixer: one file, nothing else edited, and it trains by its name in a pattern."""

import dataclasses
import importlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from plait.configs.codec import decode, encode
from plait.configs.command_line.cli import parse_experiment
from plait.configs.probe import ProbeConfig
from plait.kernels import Tokens
from plait.models import mixers
from plait.models.config import LMConfig
from plait.models.mixers import base
from plait.models.mixers.moh import MoHConfig
from plait.tests.models.common import build, layout, quick_jit
from plait.tests.tolerances import assert_close
from plait.train.probes.base import Probes

FILE = '''
"""Linear attention with the feature map elu + 1."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import decay, decay_rows
from plait.models.axes import EMBED, HEADS
from plait.models.layers.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig, register
from plait.models.mixers.heads import join_heads, split_heads
from plait.models.layers.norms import RMSNorm


@register("elu_attention", kind="linear", source="Transformers are RNNs (2006.16236)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EluAttentionConfig(MixerConfig):
    """`S_t = S_{t-1} + phi(k_t) v_t^T`, `o_t = S_t^T phi(q_t)`, phi = elu + 1, normalised per head."""

    num_heads: int = 4
    """Heads."""

    def build(self, d_model, ctx):
        return EluAttention(self, d_model, ctx)

    def mixing_flops(self, d_model, seq_len):
        return 4.0 * d_model * d_model / self.num_heads


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array


class EluAttention(HeadMixer):
    def __init__(self, config, d_model, ctx):
        self.num_heads, self.head_dim = config.num_heads, d_model // config.num_heads
        self.q, self.k, self.v = (Dense(ctx, d_model, d_model, (EMBED, HEADS)) for _ in range(3))
        self.norm = RMSNorm(ctx, self.head_dim, eps=1e-5)
        self.o = Dense(ctx, d_model, d_model, (HEADS, EMBED), init=ctx.residual_init)

    def project(self, x, *, at, state):
        q, k, v = (split_heads(dense(x), self.num_heads) for dense in (self.q, self.k, self.v))
        phi = lambda y: jax.nn.elu(y) + 1
        return Inputs(phi(q), phi(k), v, jnp.zeros((*x.shape[:2], self.num_heads), jnp.float32)), state

    def attend(self, inputs, *, at, state):
        o, memory = decay(*inputs, initial_state=state, at=at)
        return o, None if state is None else memory

    def init_state(self, batch_size, max_len):
        return jnp.zeros((batch_size, self.num_heads, self.head_dim, self.head_dim), jnp.float32)

    def finish(self, o, inputs, x):
        return self.norm(o)

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        return decay_rows(inputs.q, inputs.k, inputs.g, rows=rows, at=at)
'''
WIDTH, VOCAB, LENGTH = 32, 16, 24
AT = layout((LENGTH,), (15, 7), length=LENGTH)


@pytest.fixture(scope="module", autouse=True)
def strangers_file(tmp_path_factory):
    """The file above, in a folder that the mixers' package also searches; taken out again afterwards."""
    folder = tmp_path_factory.mktemp("mixers")
    (folder / "elu_attention.py").write_text(textwrap.dedent(FILE))
    mixers.__path__.append(str(folder))
    importlib.invalidate_caches()
    yield
    mixers.__path__.remove(str(folder))
    sys.modules.pop("plait.models.mixers.elu_attention", None)
    base.MIXERS.forget("elu_attention")


def lm(pattern: str) -> LMConfig:
    return LMConfig(d_model=WIDTH, num_layers=4, pattern=pattern, vocab_size=VOCAB)


def test_it_is_found_by_name():
    assert "elu_attention" in base.MIXERS.all()
    assert base.MIXERS["elu_attention"].kind == "linear"
    with pytest.raises(ValueError, match="did you mean 'elu_attention'"):
        base.MIXERS["elu_atention"]


def test_it_works_in_patterns_json_and_the_command_line():
    config = lm("elu_attention*3,moh+elu_attention")
    assert decode(LMConfig, encode(config)) == config
    experiment = parse_experiment(
        "lm_tiny", ["--model.pattern", "elu_attention", "--model.mixers.elu-attention.num-heads", "2", "--steps", "20"]
    )
    assert {m.num_heads for m in experiment.model.layer_mixers} == {2}


def test_it_trains_decodes_and_shows_itself():
    config = lm("elu_attention,moh+elu_attention")
    assert isinstance(config.mixers["moh+elu_attention"], MoHConfig)
    graph, params = nnx.split(build(config, seq_len=LENGTH))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)), jnp.int32)
    at = dataclasses.replace(AT, ids=tokens)
    tx = optax.adam(1e-2)

    def loss(params):
        logits, _ = nnx.merge(graph, params)(at)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        weight = at.segment_ids[:, 1:] > 0
        return (nll * weight).sum() / weight.sum()

    @quick_jit
    def step(params, opt):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, losses = tx.init(params), []
    for _ in range(40):
        params, opt, value = step(params, opt)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]  # it learns the two rows by heart

    model = nnx.merge(graph, params)
    full = quick_jit(lambda params: nnx.merge(graph, params)(at, observer=Probes(ProbeConfig(rows=4))))
    logits, extras = full(params)
    assert len(extras) == 4
    assert all(np.isfinite(one.statistics["entropy"]).all() for one in extras)
    step_once = quick_jit(lambda params, *args: nnx.merge(graph, params).step(*args))
    state = model.init_state(2, LENGTH)
    for t in range(6):
        stepped, state = step_once(params, Tokens(tokens[:, t : t + 1], None, jnp.full((2, 1), t)), state)
        assert_close(stepped, logits[:, t])
