"""Mixture-of-Head: gates, load balance, routers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from plait.configs.probe import ProbeConfig
from plait.models.build import BuildContext
from plait.models.mixers.base import MIXERS, MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.moh import MoH, MoHConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close
from plait.train.probes.base import Probes
from plait.train.probes.head_load import HeadLoad

WIDTH, LENGTH = 64, 24
AT = layout((LENGTH,), (10, 8), length=LENGTH)
SOFTMAX = SoftmaxConfig(num_heads=8, head_dim=8)
INNER = {"softmax": SOFTMAX} | {n: MIXERS.all()[n].example() for n in ("gla", "gated_deltanet")}


def build(config: MoHConfig, seed: int = 0) -> MoH:
    return config.build(WIDTH, BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(seed), seq_len=LENGTH))


def inputs(seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, LENGTH, WIDTH))


def make_uniform(moh: MoH) -> None:
    """Routers that know nothing: every probability equal."""
    for router in (moh.routed_router, moh.shared_router, moh.balance_router):
        if router is not None:
            router.kernel[...] = jnp.zeros_like(router.kernel[...])


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("num_shared", [0, 1, 2])
def test_each_token_has_its_shared_heads_and_exactly_k_routed_ones(inner, num_shared):
    moh = build(MoHConfig(mixer=INNER[inner], num_shared_heads=num_shared, top_k=2))
    active = np.asarray(quick_jit(moh.gates)(inputs())) > 0
    assert active[..., :num_shared].all()
    assert (active[..., num_shared:].sum(-1) == 2).all()


@pytest.mark.parametrize("num_shared", [0, 1, 2])
def test_gates_of_active_heads_average_one_under_uniform_routing(num_shared):
    moh = build(MoHConfig(mixer=SOFTMAX, num_shared_heads=num_shared, top_k=3))
    make_uniform(moh)
    gates = np.asarray(quick_jit(moh.gates)(inputs()))
    assert_close(gates, np.float32(gates > 0))


def test_gates_of_active_heads_average_about_one_at_initialisation():
    moh = build(MoHConfig(mixer=SOFTMAX, num_shared_heads=2, top_k=3))
    gates = np.asarray(quick_jit(moh.gates)(0.02 * inputs()))  # inputs at which the routers are still nearly uniform
    assert gates[gates > 0].mean() == pytest.approx(1, abs=0.01)


@pytest.mark.proves("moh")
def test_gates_of_two_tokens_worked_by_hand():
    moh = build(MoHConfig(mixer=dataclasses.replace(SOFTMAX, num_heads=5), num_shared_heads=2, top_k=2))
    ln = math.log
    kernel = lambda *odds: jnp.asarray(np.concatenate([odds, np.zeros((WIDTH - 2, len(odds[0])))]), jnp.float32)
    # Odds of routed heads, of shared ones, and of shared to routed: 1:2:5, 1:3, 1:4 for token e_0; 6:3:1, 1:1, 2:1 for e_1.
    moh.routed_router.kernel[...] = kernel([0, ln(2), ln(5)], [ln(6), ln(3), 0])
    moh.shared_router.kernel[...] = kernel([0, ln(3)], [0, 0])
    moh.balance_router.kernel[...] = kernel([0, ln(4)], [ln(2), 0])
    tokens = jnp.asarray(np.eye(WIDTH, dtype=np.float32)[None, :2])
    # a = 2 (1/5, 4/5), s = 2 (1/4, 3/4), r = 2 (-, 2/7, 5/7);  a = 2 (2/3, 1/3), s = (1, 1), r = 2 (6/9, 3/9, -)
    first = [2 / 5 * 1 / 2, 2 / 5 * 3 / 2, 0, 8 / 5 * 4 / 7, 8 / 5 * 10 / 7]
    second = [4 / 3, 4 / 3, 2 / 3 * 12 / 9, 2 / 3 * 6 / 9, 0]
    gates, losses = quick_jit(lambda x: (moh.gates(x), moh.auxiliary_losses(None, x, at=layout((2,), length=2))))(tokens)
    assert_close(gates, np.array([[first, second]]))
    # p = (1/8, 2/8, 5/8) and (6/10, 3/10, 1/10); both keep head 1, one head 2, one head 0.
    p, load = np.array([29 / 80, 22 / 80, 29 / 80]), np.array([1 / 2, 1, 1 / 2])
    expected = moh.config.balance * 3 * (p * load).sum()
    assert_close(losses["balance/moh"], np.float32(expected))


@pytest.mark.proves("moh")
@pytest.mark.parametrize("inner", INNER)
def test_all_but_one_mixes_the_layers_that_lack_a_head(inner):
    """`sum_i p_i h / (h - 1) sum_(j != i) H_j W_j` over the experts i, the layers without head i."""
    moh, x = build(MoHConfig(mixer=INNER[inner], experts="all_but_one")), inputs()

    @quick_jit
    def by_parts(x):
        read, _ = moh.project(x, at=AT, state=None)
        heads = moh.inner.finish(moh.attend(read, at=AT, state=None)[0], read, x)
        number = moh.num_heads
        without = [moh.output(heads.at[:, :, i].set(0)) * number / (number - 1) for i in range(number)]
        p = jax.nn.softmax(moh.routed_router(x), axis=-1)
        return jnp.einsum("bti,ibtd->btd", p, jnp.stack(without)), moh.gates(x).mean(-1)

    @quick_jit
    def whole(x):
        mixed = moh(x, at=AT, carry={})
        return mixed.y, mixed.losses

    (expected, gates), (y, losses) = by_parts(x), whole(x)
    assert_close(y, expected)
    assert losses == {}
    assert_close(gates, np.ones(x.shape[:2], np.float32))


def by_queries(**options) -> MoH:
    return build(MoHConfig(mixer=dataclasses.replace(SOFTMAX, num_kv_heads=2), router="query_norm", **options))


@pytest.mark.proves("moh")
def test_the_norms_of_queries_choose_heads_whole():
    """As the authors go on from Llama 3: `softmax(|q| / std |q|)` over routed heads, by hand, and gates that are 0 or 1."""
    moh, x = by_queries(num_shared_heads=4, top_k=2), inputs()

    @quick_jit
    def found(x):
        read, _ = moh.project(x, at=AT, state=None)
        return moh.routing(x, read), moh.gates(x, read), moh.auxiliary_losses(read, x, at=AT)["balance/moh"]

    norms = np.linalg.norm(np.asarray(x @ moh.inner.q.kernel[...], np.float64).reshape(2, LENGTH, 8, 8), axis=-1)[..., 4:]
    odds = np.exp(norms / norms.std(-1, ddof=1, keepdims=True))
    (p, chosen), gates, loss = found(x)
    assert_close(p, odds / odds.sum(-1, keepdims=True))
    largest = norms >= np.sort(norms, axis=-1)[..., -2:-1]
    np.testing.assert_array_equal(chosen, largest)
    np.testing.assert_array_equal(gates, np.concatenate([np.ones((2, LENGTH, 4)), largest], axis=-1))
    real = np.asarray(AT.segment_ids > 0)[..., None]
    mean = lambda y: (np.asarray(y) * real).sum((0, 1)) / real.sum()
    assert_close(loss, np.float32(0.01 * 4 * (mean(p) * mean(chosen)).sum()))


def test_the_gradient_of_whole_gates_is_that_of_the_probabilities():
    moh, x = by_queries(num_shared_heads=4, top_k=2), inputs()
    weights = jax.random.normal(jax.random.key(3), (2, LENGTH, 8))

    def through(gates):
        def loss(q):
            read, _ = moh.project(x, at=AT, state=None)
            return (gates(read._replace(q=q)) * weights).sum()

        return quick_jit(lambda x: jax.grad(loss)(moh.project(x, at=AT, state=None)[0].q))(x)

    def kept(read):
        p, chosen = moh.routing(x, read)
        return jnp.pad(p * chosen, ((0, 0), (0, 0), (4, 0)))

    gradient = through(lambda read: moh.gates(x, read))
    assert_close(gradient, through(kept))
    assert float(jnp.abs(gradient).max()) > 0


def test_queries_that_are_alike_or_zero_have_finite_gradients():
    moh, x = by_queries(num_shared_heads=4, top_k=2), jnp.zeros((2, LENGTH, WIDTH))
    graph, params = nnx.split(moh)
    gradients = quick_jit(jax.grad(lambda p: nnx.merge(graph, p)(x, at=AT, carry={}).losses["balance/moh"]))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_all_heads_chosen_whole_are_the_layer_without_moh():
    moh, x = by_queries(num_shared_heads=4, top_k=4), inputs()
    assert_close(*quick_jit(lambda x: (moh(x, at=AT, carry={}).y, moh.inner(x, at=AT, carry={}).y))(x))


def test_query_norms_need_queries_and_three_heads():
    with pytest.raises(ValueError, match="needs the queries of softmax attention, and mixer=gla is another"):
        MoHConfig(mixer=INNER["gla"], router="query_norm")
    with pytest.raises(ValueError, match="num_shared_heads=6 must leave three heads of 8"):
        by_queries(num_shared_heads=6)


def test_output_is_the_gated_sum_of_the_heads():
    config = MoHConfig(mixer=SOFTMAX, num_shared_heads=2, top_k=3)
    moh, x = build(config), inputs()

    @quick_jit
    def both(x):
        a, v = moh.implied_attention(x, at=AT), moh.project(x, at=AT, state=None)[0].v
        o = jnp.einsum("bhts,bshv,bth->bthv", a, v, moh.gates(x))
        return moh(x, at=AT, carry={}).y, moh.output(o)

    real = np.asarray(AT.segment_ids > 0)
    y, by_hand = (np.asarray(a)[real] for a in both(x))
    assert_close(y, by_hand)


@pytest.mark.parametrize("top_k", [1, 3])
def test_balance_loss_is_k_times_the_coefficient_under_uniform_routing(top_k):
    moh = build(MoHConfig(mixer=SOFTMAX, num_shared_heads=2, top_k=top_k, balance=0.25))
    make_uniform(moh)
    losses = quick_jit(lambda x: moh(x, at=AT, carry={}).losses)(inputs())
    assert losses.keys() == {"balance/moh"}
    assert_close(losses["balance/moh"], np.float32(0.25 * top_k))


def test_balance_loss_is_larger_for_skewed_routing():
    moh = build(MoHConfig(mixer=SOFTMAX, num_shared_heads=0, top_k=2, balance=1.0))
    x = inputs().at[..., 0].set(1.0)
    moh.routed_router.kernel[...] = jnp.zeros((WIDTH, 8)).at[0, :2].set(20.0)  # every token takes the same two heads
    assert_close(moh.auxiliary_losses(None, x, at=AT)["balance/moh"], np.float32(8 * 2 * 0.5))  # E sum_e p_e m_e


def test_balance_loss_spreads_a_skewed_load():
    moh = build(MoHConfig(mixer=SOFTMAX, num_shared_heads=1, top_k=2, balance=1.0))
    x = inputs().at[..., 0].set(1.0)
    router = moh.routed_router.kernel
    router[...] = router[...].at[0, :2].add(3.0)
    graph, params = nnx.split(moh)
    tx = optax.adam(3e-2)

    @quick_jit
    def step(params, opt, x):
        grads = jax.grad(lambda p: nnx.merge(graph, p).auxiliary_losses(None, x, at=AT)["balance/moh"])(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    load = lambda params: np.asarray(nnx.merge(graph, params).loads(None, x, at=AT)[1])
    before, opt = load(params), tx.init(params)
    for _ in range(50):
        params, opt = step(params, opt, x)
    after = load(params)
    assert before.max() > 0.9
    assert before.min() < 0.1
    assert after.max() < 0.5
    assert after.min() > 0.1
    assert after.sum() == pytest.approx(2)


@pytest.mark.parametrize("inner", INNER)
def test_gradient_reaches_every_router(inner):
    moh = build(MoHConfig(mixer=INNER[inner], num_shared_heads=2, top_k=2, balance=0.0))
    graph, params = nnx.split(moh)
    target = inputs(7)
    loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(inputs(), at=AT, carry={}).y - target))
    grads = nnx.to_pure_dict(quick_jit(jax.grad(loss))(params))
    for router in ("routed_router", "shared_router", "balance_router"):
        assert np.abs(grads[router]["kernel"]).max() > 0, router


def test_head_load_of_the_probe_is_the_share_of_tokens():
    moh, x = build(MoHConfig(mixer=SOFTMAX, num_shared_heads=2, top_k=3)), inputs()
    probes = Probes(ProbeConfig())

    @quick_jit
    def look(x):
        return HeadLoad().measure(moh(x, at=AT, carry={}, observer=probes).looks[0], probes.config), moh.gates(x) > 0

    shown, used = look(x)
    active = np.asarray(used)[np.asarray(AT.segment_ids > 0)]
    assert_close(shown["head_load"], active.mean(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headless(MixerConfig):
    """A mixer without heads."""

    name, kind = "headless", "full"

    def build(self, d_model, ctx):
        return nnx.Module()

    def mixing_flops(self, d_model, seq_len):
        return 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoHConfig(mixer=MoHConfig()), "wrap a mixer once"),
        (lambda: MoHConfig(num_shared_heads=-1), "num_shared_heads=-1"),
        (lambda: MoHConfig(balance=-0.5), "balance=-0.5"),
        (
            lambda: build(MoHConfig(mixer=SOFTMAX, num_shared_heads=8)),
            "num_shared_heads=8 must leave a head of 8; use at most 7",
        ),
        (lambda: build(MoHConfig(mixer=SOFTMAX, top_k=8)), "top_k=8 must be at most the 7 routed heads; use 7 or less"),
        (lambda: build(MoHConfig(mixer=SOFTMAX, top_k=0)), "top_k=0 must be a whole number from 1"),
        (lambda: build(MoHConfig(mixer=Headless())), "headless has no head outputs"),
        (lambda: MoHConfig(experts="all_but_one", top_k=2), "top_k=2 chooses heads, of which experts='all_but_one' uses all"),
        (
            lambda: build(MoHConfig(mixer=dataclasses.replace(SOFTMAX, num_heads=1), experts="all_but_one")),
            "mixer=softmax has one head, which leaves nothing to choose; wrap a mixer with more",
        ),
    ],
    ids=[
        "nested",
        "negative-shared",
        "negative-balance",
        "all-shared",
        "k-too-large",
        "k-zero",
        "no-heads",
        "all-chosen",
        "one-head",
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
