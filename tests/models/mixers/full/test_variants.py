"""Attention with other queries, keys, values and combinations: what each mixer's source says of it, head by head in NumPy, and the
traps of each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.diff import DiffConfig
from plait.models.mixers.full.diff_qkv import DiffQKVConfig
from plait.models.mixers.full.diff_v2 import DiffV2Config
from plait.models.mixers.full.dual_attention import DualAttentionConfig
from plait.models.mixers.full.kdgqa import KDGQA, KDGQAConfig, allocate
from plait.models.mixers.full.kv_shift import KVShiftConfig
from plait.models.mixers.full.mdha import MDHAConfig
from plait.models.mixers.full.mhe import MHEConfig
from plait.models.mixers.full.rcmha import RCMHAConfig
from plait.models.mixers.full.shared_diff import SharedDiffConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.models.positions.learned import LearnedConfig
from plait.tests.models import common
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import program_of, random_batch, tiny
from plait.train.step import make_step

WIDTH, LENGTH = 32, 11
AT = layout((LENGTH,), (6, 4), length=LENGTH)
REAL = np.asarray(AT.segment_ids > 0)
X = jax.random.normal(jax.random.key(5), (2, LENGTH, WIDTH))


def build(config: MixerConfig, layer: int = 0, causal: bool = True, moved: bool = True):
    """The layer, its parameters moved off their initial values."""
    ctx = BuildContext(layer_index=layer, num_layers=4, rngs=nnx.Rngs(0), seq_len=LENGTH, causal=causal)
    mixer = config.build(WIDTH, ctx)
    leaves = jax.tree.leaves(nnx.state(mixer, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable))
    for i, parameter in enumerate(leaves if moved else ()):
        parameter[...] = parameter[...] + 0.2 * jax.random.normal(jax.random.key(i), parameter.shape)
    return mixer


def run(mixer) -> np.ndarray:
    return np.asarray(mixer(X, at=AT, carry={}).y)[REAL]


def matrix(dense) -> np.ndarray:
    return np.asarray(dense.kernel[...], np.float64)


def heads(x: np.ndarray, dense, number: int) -> np.ndarray:
    """`[number, T, K]`."""
    return np.moveaxis((x @ matrix(dense)).reshape(len(x), number, -1), 1, 0)


def causal_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Causal softmax `[T, T]` of one head's queries and keys."""
    z = q @ k.T / np.sqrt(q.shape[1])
    a = np.exp(z - z.max(-1, keepdims=True)) * np.tri(len(q))
    return a / a.sum(-1, keepdims=True)


def by_document(mixer, formula) -> np.ndarray:
    """What `formula` makes of the heads `[H, T, K]` of each document, projected back."""
    y = np.zeros((2, LENGTH, WIDTH))
    ids = np.asarray(AT.segment_ids)
    for row, document in ((r, d) for r in range(2) for d in set(ids[r]) - {0}):
        where = np.flatnonzero(ids[row] == document)
        o = formula(np.asarray(X, np.float64)[row, where])
        y[row, where] = np.moveaxis(o, 0, 1).reshape(len(where), -1) @ matrix(mixer.o)
    return y[REAL]


def test_differential_weights_start_at_the_value_of_their_layer():
    config = DiffConfig(num_heads=2, head_dim=8)
    starts = []
    for layer in range(3):
        mixer = build(config, layer, moved=False)
        mixer.vectors[...] = jnp.zeros_like(mixer.vectors[...])
        starts.append(float(mixer.weight()))
    np.testing.assert_allclose(starts, [0.2, 0.3555, 0.4707], atol=5e-5)


def test_stacked_layers_have_the_weights_of_their_depth():
    model = LMConfig(
        d_model=WIDTH, num_layers=3, pattern="diff", mixers={"diff": DiffConfig(num_heads=2, head_dim=8)}, vocab_size=8
    )
    block = common.build(model, seq_len=LENGTH).stack.periods[0]
    assert_close(block.mixer.start[...], np.float32(0.8 - 0.6 * np.exp(-0.3 * np.arange(3))))


def test_heads_are_scaled_by_the_start_of_the_weight_not_by_the_weight():
    mixer = build(DiffConfig(num_heads=2, head_dim=8), layer=2)
    o = jax.random.normal(jax.random.key(1), (1, 3, 2, 16))
    assert abs(float(mixer.weight()) - float(mixer.start[...])) > 0.1
    assert_close(mixer.finish(o, None, None), (1 - (0.8 - 0.6 * np.exp(-0.6))) * mixer.norm(o))


def test_both_maps_of_a_head_use_the_keys_of_its_group():
    """Queries of a head stand side by side: a layout by halves would give its maps two groups of keys."""
    mixer = build(DiffV2Config(num_heads=4, num_kv_heads=2, head_dim=8, positions=None))

    def formula(x):
        q, k, v = heads(x, mixer.q, 8), heads(x, mixer.k, 2), heads(x, mixer.v, 2)
        weight = 1 / (1 + np.exp(-x @ matrix(mixer.weight)))
        maps = [causal_weights(q[i], k[i // 4]) for i in range(8)]
        return np.stack([(maps[2 * h] - weight[:, [h]] * maps[2 * h + 1]) @ v[h // 2] for h in range(4)])

    assert_close(run(mixer), by_document(mixer, formula))


@pytest.mark.proves("shared_diff")
def test_shared_bases_are_the_summed_matrices_of_plain_differential_attention():
    shared = build(SharedDiffConfig(num_heads=4, num_kv_heads=2, head_dim=8, rank=3), layer=1)
    plain = build(DiffConfig(num_heads=4, num_kv_heads=2, head_dim=8), layer=1)
    for name, number in (("q", 4), ("k", 2)):
        changes = [base[0].kernel[...] @ base[1].kernel[...] for base in getattr(shared, f"{name}_changes")]
        summed = [(getattr(shared, name).kernel[...] + change).reshape(WIDTH, number, 8) for change in changes]
        getattr(plain, name).kernel[...] = jnp.stack(summed, axis=2).reshape(WIDTH, -1)
    plain.v, plain.o, plain.vectors, plain.norm = shared.v, shared.o, shared.vectors, shared.norm
    assert_close(run(shared), run(plain))


@pytest.mark.proves("shared_diff")
def test_three_tokens_of_shared_differential_attention_by_hand():
    mixer = build(SharedDiffConfig(num_heads=1, head_dim=1, rank=1, positions=None))
    unit = lambda row, out: jnp.zeros((WIDTH, out)).at[row].set(1.0)
    mixer.q.kernel[...], mixer.k.kernel[...] = unit(0, 1), unit(1, 1)
    mixer.v.kernel[...] = jnp.zeros((WIDTH, 2)).at[2, 0].set(1.0).at[3, 1].set(1.0)
    for changes, row in ((mixer.q_changes, 4), (mixer.k_changes, 5)):
        for (down, up), factor in zip(changes, (0.0, 1.0), strict=True):  # the second map sees one more channel
            down.kernel[...], up.kernel[...] = unit(row, 1), jnp.full((1, 1), factor)
    mixer.vectors[...] = jnp.zeros_like(mixer.vectors[...])  # the weight is 0.2
    ln = np.log
    x = np.zeros((1, 3, WIDTH), np.float32)
    x[0, :, 0], x[0, :, 1] = 1, (0, ln(2), ln(4))  # odds of the first map 1 : 2 : 4
    x[0, :, 5] = (0, -ln(2), -ln(4))  # and of the second 1 : 1 : 1
    x[0, :, 2], x[0, :, 3] = (7, 14, 21), (1, 0, 0)
    o = mixer.attend(
        mixer.project(jnp.asarray(x), at=layout((3,), length=3), state=None)[0], at=layout((3,), length=3), state=None
    )[0]
    means = [(7, 7), ((7 + 2 * 14) / 3, 10.5), ((7 + 2 * 14 + 4 * 21) / 7, 14)]
    firsts = [(1, 1), (1 / 3, 1 / 2), (1 / 7, 1 / 3)]
    expected = [[a - 0.2 * b, c - 0.2 * d] for (a, b), (c, d) in zip(means, firsts, strict=True)]
    assert_close(o[0, :, 0], np.float32(expected))


def shifted(config: KVShiftConfig, k_taps: tuple[float, float], v_taps: tuple[float, float]):
    """A layer whose heads mix the previous key and this one, and values, with these weights."""
    mixer = build(config)
    for shift, taps in ((mixer.k_shift, k_taps), (mixer.v_shift, v_taps)):
        shift.weight[...] = jnp.broadcast_to(jnp.asarray(taps, jnp.float32)[:, None], shift.weight.shape)
    return mixer


KV_SHIFT = KVShiftConfig(num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.proves("kv_shift")
def test_no_shift_is_softmax_attention():
    mixer, plain = shifted(KV_SHIFT, (0, 1), (0, 1)), build(SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8))
    plain.q, plain.k, plain.v, plain.o = mixer.q, mixer.k, mixer.v, mixer.o
    assert_close(run(mixer), run(plain))


@pytest.mark.proves("kv_shift")
@pytest.mark.parametrize("positions", [False, True], ids=["nope", "rotary"])
def test_keys_and_values_are_shifted_before_they_are_turned_and_a_document_begins_with_nothing(positions):
    config = KV_SHIFT if positions else dataclasses.replace(KV_SHIFT, positions=None)
    mixer = build(config)
    taps_k, taps_v = (np.asarray(m.weight[...], np.float64) for m in (mixer.k_shift, mixer.v_shift))
    assert len(set(taps_k.ravel())) == 4

    def turn(y):
        if not positions:
            return y
        angle = np.exp(1j * np.arange(len(y))[:, None] * 10_000.0 ** (-np.arange(4) / 4))
        z = (y[:, :4] + 1j * y[:, 4:]) * angle
        return np.concatenate([z.real, z.imag], axis=-1)

    def formula(x):
        q, k, v = heads(x, mixer.q, 4), heads(x, mixer.k, 2), heads(x, mixer.v, 2)
        before = lambda y: np.concatenate([np.zeros_like(y[:, :1]), y[:, :-1]], axis=1)
        k = taps_k[0][:, None, None] * before(k) + taps_k[1][:, None, None] * k
        v = taps_v[0][:, None, None] * before(v) + taps_v[1][:, None, None] * v
        return np.stack([causal_weights(turn(q[h]), turn(k[h // 2])) @ v[h // 2] for h in range(4)])

    assert_close(run(mixer), by_document(mixer, formula))


@pytest.mark.proves("kv_shift")
def test_three_shifted_tokens_by_hand():
    mixer = shifted(KVShiftConfig(num_heads=1, head_dim=1, positions=None), (1 / 2, 1 / 2), (1 / 4, 1 / 2))
    for row, dense in enumerate((mixer.q, mixer.k, mixer.v)):
        dense.kernel[...] = jnp.zeros((WIDTH, 1)).at[row].set(1.0)
    x, at = np.zeros((1, 3, WIDTH), np.float32), layout((3,), length=3)
    x[0, :, 0], x[0, :, 1], x[0, :, 2] = 1, (0, 2 * np.log(2), 0), (4, 8, 0)  # k' = (0, ln 2, ln 2), v' = (2, 5, 2)
    o, _ = mixer.attend(mixer.project(jnp.asarray(x), at=at, state=None)[0], at=at, state=None)
    assert_close(o[0, :, 0, 0], np.float32([2, (2 + 2 * 5) / 3, (2 + 2 * 5 + 2 * 2) / 5]))


@pytest.mark.proves("kv_shift")
def test_one_layer_is_an_induction_head():
    """With keys of the previous token and values of this one, a token finds what followed it before (theorem 1)."""
    mixer = shifted(KVShiftConfig(num_heads=1, head_dim=WIDTH, positions=None), (1, 0), (0, 1))
    for dense, factor in ((mixer.q, 200.0), (mixer.k, 1.0), (mixer.v, 1.0), (mixer.o, 1.0)):
        dense.kernel[...] = factor * jnp.eye(WIDTH)
    tokens = np.array([3, 7, 1, 9, 3])
    y = mixer(jnp.eye(WIDTH)[tokens][None], at=layout((5,), length=5), carry={}).y
    assert int(jnp.argmax(y[0, -1])) == 7
    assert float(y[0, -1, 7]) == pytest.approx(1, abs=1e-5)


def test_shifts_start_uniform_and_sum_to_one():
    mixer = build(KVShiftConfig(num_heads=4, head_dim=8), moved=False)
    for shift in (mixer.k_shift, mixer.v_shift):
        taps = np.asarray(shift.weight[...])
        assert taps.shape == (2, 4)
        assert_close(taps.sum(0), np.ones(4, np.float32))
        assert ((taps >= 0) & (taps <= 1)).all()
        assert len(set(taps[0].tolist())) == 4


@pytest.mark.parametrize("config", [MDHAConfig(num_heads=4, head_dim=8), RCMHAConfig(num_heads=4, head_dim=8)])
def test_convolutions_start_as_primers(config):
    taps = build(config, moved=False).k_conv.weight[...]
    assert_close(taps, np.broadcast_to(np.float32([[1 / 6], [1 / 6], [1 / 2]]), taps.shape))


def test_relative_scores_depend_on_distances_alone():
    """Also far from the start, where the sines of positions are near none of the first ones."""
    mixer = build(RCMHAConfig(num_heads=2, head_dim=8, position_dim=6))
    near = layout((LENGTH,), (LENGTH,), length=LENGTH)
    far = dataclasses.replace(near, positions=near.positions + 900)
    assert_close(mixer.implied_attention(X, at=far), mixer.implied_attention(X, at=near))


@pytest.mark.proves("diff_qkv")
@pytest.mark.parametrize(("num_k_heads", "num_v_heads"), [(2, 4), (4, 2), (1, 8)])
def test_query_head_h_meets_key_h_hk_over_h_and_value_h_hv_over_h(num_k_heads, num_v_heads):
    """Repeated in a row, not tiled."""
    config = DiffQKVConfig(
        num_heads=8, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_dim=8, positions=None, augmented_q=1.5
    )
    mixer = build(config)

    def formula(x):
        silu = lambda y: y / (1 + np.exp(-y))
        mlp, q = mixer.q_mlp, x @ matrix(mixer.q)
        q = (silu(q @ matrix(mlp.gate)) * (q @ matrix(mlp.up))) @ matrix(mlp.down)
        q, k, v = q.reshape(len(x), 8, 8), heads(x, mixer.k, num_k_heads), heads(x, mixer.v, num_v_heads)
        meets = lambda h, number: h * number // 8
        return np.stack([causal_weights(q[:, h], k[meets(h, num_k_heads)]) @ v[meets(h, num_v_heads)] for h in range(8)])

    assert_close(run(mixer), by_document(mixer, formula))


@pytest.mark.proves("diff_qkv")
def test_narrow_keys_are_widened_by_head():
    config = DiffQKVConfig(num_heads=4, num_k_heads=2, num_v_heads=4, head_dim=8, k_head_dim=4, positions=None, augmented_q=None)
    mixer = build(config)

    def formula(x):
        q, k, v = heads(x, mixer.q, 4), heads(x, mixer.k, 2), heads(x, mixer.v, 4)
        k = k @ matrix(mixer.k_up)
        return np.stack([causal_weights(q[h], k[h // 2]) @ v[h] for h in range(4)])

    assert_close(run(mixer), by_document(mixer, formula))


def test_the_cache_of_own_heads_has_the_published_size():
    """Hk K' + Hv V numbers a token: Sigma 1.5B keeps 37.5% less than GQA of 16 heads, half of the keys' width less again."""
    per_token = lambda config: (config.state_bytes(2048, 100, "bfloat16") / 100 - 4) / 2  # 4 bytes of position
    sigma = DiffQKVConfig(num_heads=32, num_k_heads=4, num_v_heads=16, head_dim=64)
    gqa = SoftmaxConfig(num_heads=32, num_kv_heads=16, head_dim=64)
    assert per_token(sigma) == 4 * 64 + 16 * 64
    assert 1 - per_token(sigma) / per_token(gqa) == 0.375
    assert per_token(dataclasses.replace(sigma, k_head_dim=32)) == 4 * 32 + 16 * 64


@pytest.mark.proves("mhe")
@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_heads_are_one_projection_and_a_vector(combine):
    mixer = build(MHEConfig(num_heads=4, head_dim=8, combine=combine, positions=None))

    def formula(x):
        def of_heads(dense, vectors):
            shared, vectors = x @ matrix(dense), np.asarray(vectors[...], np.float64)
            return [shared + e if combine == "add" else shared * (e + 1) for e in vectors]

        q, k, v = (of_heads(getattr(mixer, n), getattr(mixer, f"{n}_heads")) for n in "qkv")
        return np.stack([causal_weights(q[h], k[h]) @ v[h] for h in range(4)])

    assert_close(run(mixer), by_document(mixer, formula))


@pytest.mark.proves("mhe")
def test_multiplied_heads_are_softmax_attention_with_scaled_matrices():
    mixer, plain = build(MHEConfig(num_heads=4, head_dim=8)), build(SoftmaxConfig(num_heads=4, head_dim=8))
    for name in "qkv":
        shared, vectors = getattr(mixer, name).kernel[...], getattr(mixer, f"{name}_heads")[...]
        getattr(plain, name).kernel[...] = (shared[:, None] * (1 + vectors[None])).reshape(WIDTH, -1)
    plain.o = mixer.o
    assert_close(run(mixer), run(plain))


def test_heads_cost_three_vectors_each():
    """3HK parameters over one head's q, k and v, against 3 D K for every head of plain attention."""
    config = MHEConfig(num_heads=8, head_dim=16)
    back = 8 * 16 * 128
    assert config.num_params(128) - back == 3 * 128 * 16 + 3 * 8 * 16
    assert SoftmaxConfig(num_heads=8, head_dim=16).num_params(128) - back == 3 * 128 * 8 * 16


KDGQA_CONFIG = KDGQAConfig(num_heads=8, num_kv_heads=4, head_dim=8)


def by_loops(share: np.ndarray, num_heads: int) -> list[int]:
    """The allocation, one query at a time."""
    sizes = np.round(share / share.sum() * num_heads).astype(int)
    while sizes.sum() > num_heads:
        sizes[np.argmax(sizes)] -= 1
    while sizes.sum() < num_heads:
        sizes[np.argmin(sizes)] += 1
    return sizes.tolist()


def test_queries_are_allotted_in_proportion_and_all_of_them():
    shares = np.random.default_rng(0).gamma(0.5, size=(200, 5)).astype(np.float32)
    sizes = np.asarray(quick_jit(lambda s: allocate(s, 12))(shares))
    assert (sizes.sum(-1) == 12).all() and (sizes >= 0).all()
    assert sizes.tolist() == [by_loops(share, 12) for share in shares]


def test_the_smallest_group_gets_no_query_and_equal_ones_get_as_many():
    mixer = build(KDGQA_CONFIG)
    mixer.settle({"key_norms": jnp.asarray([4.0, 1.0, 2.0, 3.0])})
    assert mixer.sizes[...].tolist() == [4, 0, 1, 3]
    assert mixer.kv_of_q().tolist() == [0, 0, 0, 0, 2, 3, 3, 3]
    mixer.settle({"key_norms": jnp.full(4, 3.0)})  # no largest and smallest: nothing is divided by 0
    assert mixer.sizes[...].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("statistic", "second"), [("difference", [6, 2, 0, 0]), ("average", [4, 2, 1, 1])])
def test_dynamic_groups_follow_their_statistic_every_few_steps(statistic, second):
    mixer = build(dataclasses.replace(KDGQA_CONFIG, statistic=statistic, every=2))
    norms = [jnp.asarray(n, jnp.float32) for n in ([1, 1, 1, 1], [9, 0, 0, 0], [4, 2, 1, 1], [0, 9, 0, 0])]
    seen = []
    for n in norms:
        mixer.settle({"key_norms": n})
        seen.append(mixer.sizes[...].tolist())
    assert seen[0] == seen[1] == [2, 2, 2, 2]
    assert seen[2] == seen[3] == second


def test_groups_stand_still_outside_training_and_no_output_depends_on_the_batch():
    mixer = build(KDGQA_CONFIG)
    mixer.settle({"key_norms": jnp.asarray([4.0, 1.0, 2.0, 3.0])})
    both = mixer(X, at=AT, carry={}).y
    changed = mixer(X.at[1].multiply(30.0), at=AT, carry={}).y
    np.testing.assert_array_equal(both[0], changed[0])
    assert mixer.sizes[...].tolist() == [4, 0, 1, 3]


def test_key_norms_leave_padding_out():
    mixer = build(KDGQA_CONFIG)
    norms = lambda x: mixer(x, at=AT, carry={}).counts["key_norms"]
    np.testing.assert_array_equal(norms(X), norms(jnp.where(REAL[..., None], X, 50.0)))


def test_stacked_layers_move_their_groups_by_their_own_keys():
    config = LMConfig(d_model=WIDTH, num_layers=3, pattern="kdgqa", mixers={"kdgqa": KDGQA_CONFIG}, vocab_size=8)
    model = common.build(config, seq_len=LENGTH)
    at = dataclasses.replace(AT, ids=jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 8))
    _, extras = model(at)
    model.stack.settle([one.counts for one in extras])
    stacked: KDGQA = model.stack.periods[0].mixer
    assert stacked.steps[...].tolist() == [1, 1, 1]
    for layer, one in enumerate(extras):
        alone = build(KDGQA_CONFIG)
        alone.settle(one.counts["mixer"])
        assert stacked.sizes[...][layer].tolist() == alone.sizes[...].tolist()


@pytest.mark.slow
def test_groups_move_once_a_step_whatever_its_micro_batches_and_not_in_a_skipped_one():
    def after(accumulate: int) -> dict[str, np.ndarray]:
        mixer = dataclasses.replace(KDGQA_CONFIG, num_heads=4, num_kv_heads=2, head_dim=4)
        model = {"model.pattern": "kdgqa", "model.mixers": {"kdgqa": mixer}}
        setup = program_of(tiny({**model, "data.batch_size": 8, "optimizer.accumulate": accumulate}))
        step, state = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, None)), setup.fresh()
        for bounds in (None, jnp.zeros(2)):  # a loss above 0 is out of bounds
            state, _ = step(state, random_batch(8), bounds)
        return {path.rpartition(".")[2]: np.asarray(buffer) for path, buffer in state.buffers.items()}

    whole, parts = after(1), after(2)
    assert whole["steps"].tolist() == [1, 1]
    assert whole["sizes"].tolist() == parts["sizes"].tolist() == np.where(np.argsort(whole["before"]), 4, 0).tolist()
    assert_close(parts["before"], whole["before"])


def test_symmetric_relations_have_one_matrix_and_count_its_parameters_once():
    config = DualAttentionConfig(num_heads=4, num_relations=4, num_symbols=6, symbol_heads=2)
    tied = dataclasses.replace(config, symmetric=True)
    assert config.num_params(WIDTH) - tied.num_params(WIDTH) == WIDTH * WIDTH // 2
    inputs, _ = build(tied).project(X, at=AT, state=None)
    np.testing.assert_array_equal(inputs.related, inputs.relating)


@pytest.mark.parametrize("causal", [True, False])
def test_relations_are_those_of_pairs(causal):
    """`sum_j A_ij W_r r_ij` through values that are wider, and with the relations of all pairs written out."""
    mixer = build(DualAttentionConfig(num_heads=4, num_relations=8, num_symbols=6, symbol_heads=2), causal=causal)
    inputs, _ = mixer.project(X, at=AT, state=None)
    finished = mixer.finish(mixer.attend(inputs, at=AT, state=None)[0], inputs, X)[:, :, 2:]
    a = np.asarray(mixer.implied(inputs, jnp.arange(LENGTH), at=AT), np.float64)[:, 2:]
    relating, related = (np.asarray(y, np.float64).reshape(2, LENGTH, 8, 2) for y in (inputs.relating, inputs.related))
    r = np.einsum("bilp,bjlp->bijl", relating, related) / np.sqrt(2)
    expected = np.einsum("bhij,bijl,hlk->bihk", a, r, matrix(mixer.of_relations))
    expected += np.einsum("bhij,bjhk->bihk", a, np.asarray(inputs.symbols, np.float64))
    assert_close(finished[REAL], expected[REAL])


@pytest.mark.parametrize(
    "config",
    [
        DiffConfig(num_heads=2, head_dim=8, positions=ALiBiConfig()),
        DualAttentionConfig(num_heads=4, num_symbols=6, symbol_heads=2, positions=ALiBiConfig()),
        MHEConfig(num_heads=4, head_dim=8, positions=LearnedConfig(max_len=16)),
    ],
    ids=lambda config: f"{config.name}-{config.positions.name}",
)
def test_other_positions_decode_as_they_train(config):
    mixer = build(config)
    whole = layout((LENGTH,), (LENGTH,), length=LENGTH)
    y, state, steps = mixer(X, at=whole, carry={}).y, mixer.init_state(2, LENGTH), []
    step = quick_jit(lambda x, state, at: mixer.step(x, state, at=at, carry={})[::2])
    for t in range(LENGTH):
        one, state = step(X[:, t : t + 1], state, dataclasses.replace(whole, segment_ids=None, positions=jnp.full((2, 1), t)))
        steps.append(one)
    assert_close(jnp.concatenate(steps, axis=1), y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DiffConfig(num_heads=4, num_kv_heads=3).fit(WIDTH),
            r"num_kv_heads=3 must divide num_heads=4; use one of 1, 2, 4",
        ),
        (lambda: DiffConfig(head_dim=12).fit(32), r"head_dim=12 must divide d_model / 2 = 16 when num_heads is None"),
        (lambda: DiffConfig(head_dim=5), r"positions\.fraction=1\.0 turns 5 channels of 5"),
        (lambda: DiffQKVConfig(num_heads=8, num_k_heads=3).fit(WIDTH), r"num_k_heads=3 must divide num_heads=8"),
        (lambda: DiffQKVConfig(k_head_dim=64), r"k_head_dim=64 must be below head_dim=64.*use None"),
        (lambda: RCMHAConfig(position_dim=5), r"position_dim=5 must be even.*use 6"),
        (
            lambda: DualAttentionConfig(num_heads=4, num_relational_heads=4).fit(WIDTH),
            r"num_relational_heads=4 must leave .* use 3",
        ),
        (lambda: DualAttentionConfig(num_heads=4, num_relations=5).fit(WIDTH), r"num_relations=5 must divide .*=16"),
        (lambda: DualAttentionConfig(num_heads=4, symbol_heads=3).fit(WIDTH), r"symbol_heads=3 must divide d_model=32"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
