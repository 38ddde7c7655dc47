"""Spectral norms against singular values in float64, and the entropy bound against the paper's formula and the entropy itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.probe import ProbeConfig
from plait.models.build import BuildContext
from plait.models.layers.linear import dense_layers, power_iterate, spectral_norm
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close
from plait.train.probes.base import Probes
from plait.train.probes.spectral import least_entropy

D_MODEL, LENGTH = 32, 24
PLAIN = SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8, positions=None)


def look_in(config, *, seed=0, size=1.0, sigma_reparam=None, causal=True):
    """A mixer, its input of two rows of documents and padding, and the probe's numbers."""
    ctx = BuildContext(rngs=nnx.Rngs(seed), seq_len=LENGTH, sigma_reparam=sigma_reparam, causal=causal)
    mixer = config.build(D_MODEL, ctx)
    at = layout((7, 12, 5), (15,), length=LENGTH)
    at = dataclasses.replace(at, ids=at.positions)
    x = size * jax.random.normal(jax.random.key(seed), (2, LENGTH, D_MODEL))
    observer = Probes(ProbeConfig(only="spectral", sequences=2))
    measure = quick_jit(lambda x: observer.measure(mixer(x, at=at, carry={}, observer=observer).looks))
    return mixer, np.asarray(x, np.float64), jax.tree.map(np.asarray, measure(x))


def largest(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False).max(-1)


def test_spectral_norm_is_the_largest_singular_value():
    x = jax.random.normal(jax.random.key(0), (3, 20, 33)).at[1].set(0.0)
    assert_close(spectral_norm(x), largest(x))


@pytest.mark.parametrize("config", usually([PLAIN, GatedDeltaNetConfig.example()], PLAIN), ids=["softmax", "gated_deltanet"])
def test_norms_of_a_mixer_are_the_largest_of_its_projections(config):
    mixer, _, found = look_in(config)
    norms = {path[-1]: largest(layer.weight()) for path, layer in dense_layers(mixer)}
    assert_close(found["spectral_norm_out"], norms.pop("o"))
    assert_close(found["spectral_norm"], max(norms.values()))


def test_under_sigma_reparam_the_norm_is_the_gain():
    mixer, _, found = look_in(PLAIN, sigma_reparam="one")
    for _, layer in dense_layers(mixer):
        layer.gain[...] = jnp.float32(3.0 if layer is mixer.o else 2.0)
    power_iterate(mixer)
    at, observer = layout((LENGTH,), length=LENGTH), Probes(ProbeConfig(only="spectral"))
    at = dataclasses.replace(at, ids=at.positions)
    measure = quick_jit(lambda x: observer.measure(mixer(x, at=at, carry={}, observer=observer).looks))
    moved = measure(jnp.ones((1, LENGTH, D_MODEL)))
    assert_close(np.stack([found["spectral_norm"], found["spectral_norm_out"]]), [1, 1])
    assert_close(np.stack([moved["spectral_norm"], moved["spectral_norm_out"]]), [2, 3])


def by_hand(mixer, x, *, causal):
    """σ, the bound and the entropy of each head over the longest documents: theorem 3.1 with dense softmax in float64."""
    q, k = (np.asarray(dense.weight(), np.float64).reshape(D_MODEL, -1, 8) for dense in (mixer.q, mixer.k))
    sigmas, bounds, entropies = [], [], []
    for head in range(4):
        form = q[:, head] @ k[:, head // 2].T / np.sqrt(8)
        sigmas.append(largest(form))
        found, entropy = [], []
        for part in (x[0, 7:19], x[1, :15]):
            sigma = sigmas[-1] * largest(part @ part.T)
            logits = part @ form @ part.T
            for i in range(len(part)):
                seen = logits[i, : i + 1] if causal else logits[i]
                p = np.exp(seen - seen.max())
                p /= p.sum()
                entropy.append(-(p * np.log(np.maximum(p, 1e-300))).sum())
                t = len(seen)
                if t == 1:
                    found.append(0.0)
                    continue
                beta = np.exp(-sigma * np.sqrt(t / (t - 1)))
                found.append(np.log(1 + (t - 1) * beta) + sigma * np.sqrt(t * (t - 1)) * beta / (1 + (t - 1) * beta))
        bounds.append(np.mean(found))
        entropies.append(np.mean(entropy))
    return sigmas, bounds, entropies


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [0.05, 0.3, 2.0])
def test_entropy_bound_is_the_papers_and_holds(size, causal):
    mixer, x, found = look_in(PLAIN, size=size, causal=causal)
    sigmas, bounds, entropies = by_hand(mixer, x, causal=causal)
    assert_close(found["logit_norm"], sigmas)
    assert_close(found["entropy_bound"], np.float32(bounds))
    assert_close(found["entropy_bounded"], entropies)
    assert (found["entropy_bounded"] >= found["entropy_bound"] - 1e-4).all()
    assert size > 0.05 or (found["entropy_bound"] > 0.5).all(), "small inputs cannot collapse"


def test_bound_is_reached():
    """The worst logits of norm s: one up, the others equally down."""
    for tokens, norm in ((2, 1.5), (5, 3.0), (9, 0.0)):
        logits = np.full(tokens, -norm / np.sqrt(tokens * (tokens - 1)))
        logits[0] = norm * np.sqrt((tokens - 1) / tokens)
        p = np.exp(logits) / np.exp(logits).sum()
        assert_close(least_entropy(jnp.float32(norm), jnp.asarray(tokens)), -(p * np.log(p)).sum())
    assert least_entropy(jnp.float32(1e30), jnp.asarray(7)) == 0 == least_entropy(jnp.float32(2), jnp.asarray(1))


def test_turned_queries_and_keys_are_bounded_by_both_norms():
    plain = look_in(PLAIN)[2]
    mixer, _, found = look_in(dataclasses.replace(PLAIN, positions=YarnRotaryConfig(factor=8.0)))
    q, k = (np.asarray(dense.weight(), np.float64).reshape(D_MODEL, -1, 8).swapaxes(0, 1) for dense in (mixer.q, mixer.k))
    magnitude = 0.1 * np.log(8.0) + 1
    assert_close(found["logit_norm"], magnitude**2 * largest(q) * np.repeat(largest(k), 2) / np.sqrt(8))
    assert (found["logit_norm"] > plain["logit_norm"]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True},
        {"qk_norm": True},
        {"window_size": 4},
        {"log_n_scale": 8},
        {"normalizer": "sigmoid"},
        {"positions": ALiBiConfig()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_logits_that_are_more_than_a_form_of_the_input_have_no_bound(changes):
    _, _, found = look_in(dataclasses.replace(PLAIN, **changes))
    assert set(found) == {"spectral_norm", "spectral_norm_out"}
