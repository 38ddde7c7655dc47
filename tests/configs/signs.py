"""Signs by which two configs are told apart: shapes, traced programs, layouts and rows, cheapest first."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.configs.experiment import ExperimentConfig
from plait.data.loader import build_data
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.tests.train.common import program_of, random_batch
from plait.train.loss import loss_terms
from plait.train.probes.base import Probes
from plait.train.step import make_step

SEQ_LEN, VOCAB = 32, 128


def text_of(jaxpr: Any) -> str:
    """A traced program as text without addresses, its constants by their bytes."""
    constants = [hashlib.sha256(np.asarray(c).tobytes()).hexdigest() for c in jaxpr.consts if hasattr(c, "shape")]
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr)) + "".join(constants)


def model_signs(config: ExperimentConfig) -> Iterator[Callable[[], Any]]:
    """What a model config decides, cheapest first."""
    setup = program_of(config, VOCAB)
    batch = random_batch(config.data.batch_size, config.data.seq_len, VOCAB)
    like = setup.like

    def loss(params, buffers):
        return loss_terms(setup.blueprint.build(params, buffers), batch, total=jnp.float32(1), share=1.0, observer=None)[0]

    yield lambda: str(jax.tree.map(lambda a: (a.shape, str(a.dtype)), like))
    yield lambda: text_of(jax.make_jaxpr(loss)(like.params, like.buffers))
    yield lambda: text_of(jax.make_jaxpr(setup.blueprint.init)())


def alone_signs(mixer: MixerConfig) -> Iterator[Callable[[], Any]]:
    """What a mixer decides in a layer of its own, which takes a fraction of the time of a model."""
    causal = mixer.directions[0] == "causal"
    ctx = lambda: BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(0), seq_len=SEQ_LEN, causal=causal)
    graph, variables = nnx.split(nnx.eval_shape(lambda: mixer.build(64, ctx())))
    at, x = Tokens(segment_ids=jnp.ones((1, SEQ_LEN), jnp.int32)), jnp.zeros((1, SEQ_LEN, 64))
    yield lambda: str(jax.tree.map(lambda a: (a.shape, str(a.dtype)), variables))
    yield lambda: text_of(jax.make_jaxpr(lambda v, x: nnx.merge(graph, v)(x, at=at, carry={}).y)(variables, x))


def seen_alone(base: MixerConfig, other: MixerConfig) -> bool:
    """Whether a layer alone tells two configs apart; where it cannot be built alone, a model must."""
    try:
        return notices(alone_signs, base, other)
    except (KeyError, TypeError, ValueError):
        return False


def step_signs(config: ExperimentConfig) -> Iterator[Callable[[], Any]]:
    """What the optimizer and probe configs decide."""
    setup = program_of(config, VOCAB)
    batch = random_batch(config.data.batch_size, config.data.seq_len, VOCAB)
    observer = Probes(config.probe) if config.probe_every is not None else None
    yield lambda: text_of(jax.make_jaxpr(make_step(setup.blueprint, setup.tx, setup.mesh, observer))(setup.like, batch))


def mixer_signs(config: ExperimentConfig) -> Iterator[Callable[[], Any]]:
    """What a model or mixer decides, the step last: some move buffers or parameters in it."""
    yield from model_signs(config)
    yield from step_signs(config)


def mesh_signs(config: ExperimentConfig) -> Iterator[Callable[[], Any]]:
    """The layout on eight devices, and the step there."""
    setup = program_of(config, VOCAB, devices=8)
    batch = random_batch(config.data.batch_size, config.data.seq_len, VOCAB)
    yield lambda: str((setup.mesh, setup.shardings))
    yield lambda: text_of(jax.make_jaxpr(make_step(setup.blueprint, setup.tx, setup.mesh, None))(setup.like, batch))


def data_signs(config: ExperimentConfig, folder: Any) -> Iterator[Callable[[], Any]]:
    """The first rows of either side."""

    def rows() -> list[bytes]:
        key = hashlib.sha256(repr(config.data).encode()).hexdigest()[:12]
        data = build_data(config.data, folder / key)
        iterator = data.train()
        batches = [next(iterator), next(iterator), *(data.val[i] for i in range(len(data.val)))]
        iterator.close()
        return [array.tobytes() for batch in batches for array in batch]

    yield rows


def folder_signs(config: ExperimentConfig) -> Iterator[Callable[[], Any]]:
    yield lambda: config.folder


@functools.lru_cache(maxsize=64)
def signs_once(signs: Callable[..., Iterator], config: Any) -> list[Callable[[], Any]]:
    """The signs of a config, each worked out once: leaves of one component have one base."""
    return [functools.cache(sign) for sign in signs(config)]


def notices(signs: Callable[..., Iterator], base: Any, other: Any) -> bool:
    """Whether any sign differs between two configs."""
    return any(left() != right() for left, right in zip(signs_once(signs, base), signs(other), strict=True))
