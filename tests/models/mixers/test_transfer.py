"""Attention transfer: what the layer gives is its teacher's, and its loss is between the two alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.lolcats import LoLCATsConfig
from plait.models.mixers.transfer import LOSS, TransferConfig
from plait.tests.models.common import layout
from plait.tests.tolerances import assert_close

WIDTH, LENGTH = 32, 11
TEACHER = SoftmaxConfig(num_heads=2, head_dim=8)
STUDENT = LoLCATsConfig(num_heads=2, head_dim=8, window_size=3, feature_dim=4)
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
AT = layout((4, 5), (LENGTH,), length=LENGTH)


def built(config):
    return config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH))


def heads(mixer, x):
    inputs, _ = mixer.project(x, at=AT, state=None)
    return mixer.finish(mixer.mix(inputs, x, at=AT), inputs, x)


@pytest.mark.proves("transfer")
@pytest.mark.parametrize("match", ["heads", "outputs"])
def test_layer_is_its_teacher_and_its_loss_the_mean_square(match):
    student = STUDENT if match == "heads" else GLAConfig(num_heads=4)
    layer = built(TransferConfig(mixer=student, teacher=TEACHER, match=match, coefficient=7.0))
    found = layer(X, at=AT, carry={})
    assert_close(found.y, layer.inner(X, at=AT, carry={}).y)
    target, given = ((heads(one, X) if match == "heads" else one(X, at=AT, carry={}).y) for one in (layer.inner, layer.student))
    real = np.asarray(AT.segment_ids) > 0
    assert real.sum() < real.size
    expected = 7 * np.square(np.asarray(target) - np.asarray(given))[real].mean()
    np.testing.assert_allclose(found.losses[LOSS], expected, rtol=1e-5)


def test_only_the_student_learns_from_the_loss():
    graph, params = nnx.split(built(TransferConfig(mixer=STUDENT, teacher=TEACHER)), nnx.Param)

    def loss(params, x):
        return nnx.merge(graph, params)(x, at=AT, carry={}).losses[LOSS]

    grads, dx = jax.grad(loss, argnums=(0, 1))(params, X)
    moved = {".".join(map(str, path)): float(jnp.abs(leaf[...]).max()) for path, leaf in nnx.to_flat_state(grads)}
    assert all(size == 0 for name, size in moved.items() if name.startswith("inner.")) and not dx.any()
    assert all(size > 0 for name, size in moved.items() if name.startswith("student.") and ".o." not in name)


def test_student_equal_to_its_teacher_has_no_loss():
    layer = built(TransferConfig(mixer=TEACHER, teacher=TEACHER))
    nnx.update(layer.student, nnx.state(layer.inner))
    assert layer(X, at=AT, carry={}).losses[LOSS] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": dataclasses.replace(STUDENT, head_dim=16)}, "2 heads of 16 channels and teacher=softmax 2 of 8; give both"),
        ({"mixer": TransferConfig()}, "mixer=transfer is itself around a mixer"),
        ({"teacher": dataclasses.replace(TEACHER, value_residual=True)}, "teacher shares values with other layers"),
    ],
)
def test_what_does_not_match_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TransferConfig(**{"mixer": STUDENT, "teacher": TEACHER, **options}).fit(WIDTH)
