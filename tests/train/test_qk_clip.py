"""QK-clip: heads whose logits grew too large are scaled back to the threshold, the others keep their bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import optimizer
from plait.configs.probe import ProbeConfig
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.layers.linear import dense_layers
from plait.models.layers.lora import LoRAConfig
from plait.models.looks.look import Everyone
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.models.qk_clip import QKClipConfig
from plait.tests.tolerances import assert_close, assert_statistics_close
from plait.tests.train.common import changed, different_arrays, program_of, random_batch, tiny
from plait.train.probes.base import Probes

WIDTH, HEADS = 16, 4
SOFTMAX = SoftmaxConfig(num_heads=HEADS, head_dim=4, qkv_bias=True)
GROUPED = dataclasses.replace(SOFTMAX, num_kv_heads=2)
LATENT = MLAConfig(num_heads=HEADS, kv_rank=8, nope_head_dim=6, rope_head_dim=4, v_head_dim=4)
RATIO = jnp.asarray([0.25, 1.0, 1.0, 0.16], jnp.float32)


def made(config):
    mixer = config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=24))
    for _, dense in dense_layers(mixer):
        if dense.bias is not None:
            dense.bias[...] = jnp.cos(jnp.arange(dense.bias.size, dtype=jnp.float32))
    return mixer


def kernels(mixer):
    found = {}
    for path, dense in dense_layers(mixer):
        found[path[-1]] = np.asarray(dense.kernel[...])
        if dense.bias is not None:
            found[path[-1] + ".bias"] = np.asarray(dense.bias[...])[None]
    return found


def scales(config, alpha):
    """What each output of each projection was multiplied by, `[H, K]`."""
    mixer = made(config)
    before = kernels(mixer)
    mixer.clip(RATIO, alpha)
    return {name: (after / before[name])[0] for name, after in kernels(mixer).items() if (after != before[name]).any()}


def test_heads_of_their_own_share_the_clipping_by_alpha():
    found = scales(SOFTMAX, 0.25)
    assert set(found) == {"q", "k", "q.bias", "k.bias"}
    for name, power in {"q": 0.25, "k": 0.75}.items():
        expected = np.repeat([0.25**power, 1, 1, 0.16**power], 4)
        assert_close(found[name], expected)
        assert_close(found[f"{name}.bias"], expected)


@pytest.mark.parametrize(
    "config", [GROUPED, dataclasses.replace(SOFTMAX, shared_kv="write"), dataclasses.replace(SOFTMAX, tie_kv=True)]
)
def test_a_key_that_others_read_too_is_left_alone(config):
    found = scales(config, 0.5)
    assert set(found) == {"q", "q.bias"}
    assert_close(found["q"], np.repeat([0.25, 1, 1, 0.16], 4))


def test_latent_attention_is_clipped_as_published():
    """Own parts by the root, the rotated part of the query by the whole ratio, the rotated key not at all."""
    found = scales(LATENT, 0.5)
    assert set(found) == {"q", "k_up"}
    expected = [[own] * 6 + [whole] * 4 for own, whole in ((0.5, 0.25), (1, 1), (1, 1), (0.4, 0.16))]
    assert_close(found["q"], np.concatenate(expected))
    assert_close(found["k_up"], np.repeat([0.5, 1, 1, 0.4], 6))


def test_wrappers_and_parts_hand_on_what_is_theirs():
    routed = made(MoHConfig(mixer=SOFTMAX))
    before = kernels(routed)
    routed.clip(RATIO, 0.5)
    assert {name for name, after in kernels(routed).items() if (after != before[name]).any()} == {"q", "k", "q.bias", "k.bias"}
    both = made(ParallelConfig(parts=(GLAConfig(num_heads=2), SOFTMAX)))
    old = [kernels(part) for part in both.parts]
    both.clip(jnp.concatenate([jnp.full(2, 0.5), RATIO]), 0.5)
    linear, softmax = ({k for k, v in kernels(part).items() if (v != was[k]).any()} for part, was in zip(both.parts, old))
    assert linear == set() and softmax == {"q", "k", "q.bias", "k.bias"}
    assert_close(kernels(both.parts[1])["q"][0, :4] / old[1]["q"][0, :4], np.full(4, 0.5))


BATCH = random_batch(4, 24)
AT = Tokens(jnp.asarray(BATCH.tokens), jnp.asarray(BATCH.segment_ids), jnp.asarray(BATCH.positions))
X = 6 * jax.random.normal(jax.random.key(1), (4, 24, WIDTH))


def dense_logits(mixer):
    """The largest visible logit of each head by the definition, in float64."""
    inputs = mixer.project(X, at=AT, state=None)[0]
    q, k = (np.asarray(part, np.float64) for part in inputs[:2])
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    z = mixer.scale * np.einsum("bthk,bshk->bhts", q, k)
    segments = np.asarray(AT.segment_ids)
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None] & np.tri(24, dtype=bool)
    return np.where(seen[:, None], z, -np.inf).max((0, 2, 3))


@pytest.mark.parametrize("config", [SOFTMAX, GROUPED, LATENT], ids=["heads", "groups", "latents"])
def test_after_clipping_no_logit_is_above_the_threshold(config):
    mixer = made(config)
    (look,) = mixer(X, at=AT, carry={}, observer=Everyone()).looks
    before = dense_logits(mixer)
    assert_close(look.max_logits, before)
    threshold = float(np.median(before))
    mixer.clip(jnp.where(look.max_logits > threshold, threshold / look.max_logits, 1), 0.5)
    assert_close(dense_logits(mixer), np.minimum(before, threshold), dtype="float32")
    assert (before > 1.01 * threshold).any() and (before < threshold).any()


def clipping(threshold, mixers=None, pattern="softmax", **changes):
    """`tiny` whose step does nothing but clip: its rate is too small to move a bit."""
    model = dataclasses.replace(
        tiny().model,
        num_layers=4,
        pattern=pattern,
        mixers=mixers or {"softmax": SoftmaxConfig(num_heads=2, head_dim=8)},
        qk_clip=QKClipConfig(threshold=threshold),
    )
    config = dataclasses.replace(
        tiny(), model=model, optimizer=optimizer("sgd", learning_rate=1e-30, weight_decay=0.0, warmup_steps=2)
    )
    return changed(config, changes)


def stepped(config, devices=1):
    """Parameters before and after a step, its metrics, and the largest logits of each layer after it."""
    program = program_of(config, devices=devices)
    fresh = program.fresh()
    old = jax.tree.map(np.array, fresh.params)
    state, metrics = program.lower().compile()(fresh, program.layout.place(random_batch(8)))
    return old, jax.tree.map(np.asarray, state.params), {name: np.asarray(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def stacked():
    return stepped(clipping(3.3, **{"data.batch_size": 8}))


def test_the_step_clips_every_layer_and_nothing_else(stacked):
    old, new, metrics = stacked
    moved = different_arrays(old, new)
    assert moved and all(".q.kernel" in name or ".k.kernel" in name for name in moved)
    heads = np.stack([new[name] / old[name] for name in old if ".q.kernel" in name])[0].reshape(4, WIDTH, 2, 8)
    assert_close(heads, np.broadcast_to(heads[:, :1, :, :1], heads.shape))
    assert metrics["optimizer/clipped_heads"] == (heads[:, 0, :, 0] < 1).sum() > 0
    assert (heads[:, 0, :, 0] == 1).any(), "a head below the threshold keeps its bits"


@pytest.mark.parametrize(
    ("changes", "devices"),
    [({"optimizer.accumulate": 2}, 1), ({"mesh": MeshConfig(data=2, tensor=2)}, 4)],
    ids=["accumulated", "sharded"],
)
def test_the_largest_logit_is_that_of_the_whole_step(changes, devices, stacked):
    _, new, metrics = stepped(clipping(3.3, **{"data.batch_size": 8, **changes}), devices)
    assert metrics["optimizer/clipped_heads"] == stacked[2]["optimizer/clipped_heads"]
    for name, value in stacked[1].items():
        assert_close(new[name], value, err_msg=name)


def test_layers_without_logits_are_left_alone():
    old, new, metrics = stepped(
        clipping(1e-3, {"gla": GLAConfig(num_heads=2), "softmax": SOFTMAX}, "gla,softmax", **{"data.batch_size": 8})
    )
    assert metrics["optimizer/clipped_heads"] == 2 * HEADS
    moved = [name for name in different_arrays(old, new) if "kernel" in name]  # a rate of nothing moves a bias of zero
    assert moved == [f"['stack.periods.1.mixer.{name}.kernel']" for name in ("k", "q")]


def test_probes_see_the_same_beside_it():
    """What the clipping looks at is the whole batch; what probes look at stays their part of it."""
    batch = random_batch()
    at = Tokens(*map(jnp.asarray, (batch.tokens, batch.segment_ids, batch.positions)))

    def shown(threshold):
        blueprint = program_of(clipping(threshold, {"gla": GLAConfig(num_heads=2), "softmax": SOFTMAX}, "gla,softmax")).blueprint
        observer = Probes(ProbeConfig(rows=4, sequences=2))
        return jax.jit(lambda *state: blueprint.build(*state).hidden(at, observer=observer)[1])(*blueprint.init())

    for plain, beside in zip(shown(None), shown(3.3), strict=True):
        assert plain.max_logits is None and beside.max_logits is not None
        assert plain.statistics.keys() == beside.statistics.keys() >= {"entropy"}
        for name, value in plain.statistics.items():
            assert_statistics_close(beside.statistics[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "gla"}, r"qk_clip\.threshold=100 finds no layer whose logits it could clip: mixers\.gla has no heads"),
        (
            {"mixers": {"softmax": SoftmaxConfig(num_heads=2, head_dim=8, qk_norm=True)}},
            r"mixers\.softmax has qk_norm=True, which sets the size of queries and keys whatever their projections are; leave it out",
        ),
        ({"mixers": {"softmax": SoftmaxConfig(num_heads=2, head_dim=8, logit_soft_cap=50.0)}}, "which bounds the logits"),
        ({"sigma_reparam": "one"}, r"qk_clip\.threshold=100 scales kernels, and with sigma_reparam=one"),
        ({"lora": LoRAConfig(rank=2)}, r"with lora\.rank=2 they do not set the logits alone"),
    ],
)
def test_what_has_nothing_to_clip_is_refused(changes, message):
    options = {"d_model": 64, "num_layers": 2, "pattern": "softmax", "qk_clip": QKClipConfig(threshold=100.0), **changes}
    with pytest.raises(ValueError, match=message):
        LMConfig(**options)


def test_alpha_without_a_threshold_is_refused():
    with pytest.raises(ValueError, match=r"model\.qk_clip\.alpha=0\.3 is of a threshold, and there is none"):
        QKClipConfig(alpha=0.3)
