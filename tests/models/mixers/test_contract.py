"""The mixer contract, over every registered mixer: what a new file in `models/mixers` must keep, tested without an edit here."""

import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.codec import decode, encode
from plait.kernels.tolerances import bound
from plait.models.mixers.base import HeadMixer, MixerConfig
from plait.models.mixers.moh import MoHConfig
from plait.tests.models import common
from plait.tests.models.mixers.subject import (
    BEFORE,
    BORDERS,
    LENGTH,
    MESH,
    PACKED,
    PROBES,
    PROMPTS,
    REAL,
    ROWS,
    SEGMENTS,
    STEPS,
    WIDTH,
    Case,
    Subject,
    case_params,
    layout,
    program,
)
from plait.tests.models.mixers.traced_flops import count_flops
from plait.tests.tolerances import assert_close
from plait.train import mesh as meshes


@pytest.fixture(scope="module", params=case_params())
def subject(request, give_up) -> Iterator[Subject]:
    if isinstance(config := request.param.config, MoHConfig):
        inner = nnx.eval_shape(Case(config.mixer).build)
        if not isinstance(inner, HeadMixer) or inner.num_heads < 2:
            pytest.skip(f"{config.mixer.name} has no heads to route")
    yield Subject(request.param)
    give_up()


@pytest.fixture
def plain_subject(subject) -> Subject:
    if subject.case.sigma_reparam is not None:
        pytest.skip("says nothing of the projections, of which alone sigmaReparam is a property")
    return subject


of_families = pytest.mark.parametrize("subject", case_params(thorough=False), indirect=True)
"""What costs programs of its own, and lies more in the layers that mixers are made of: of the bases of families, the rest slow."""


def finite(*trees) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_has_the_input_shape_and_the_compute_dtype(subject, dtype):
    y, stepped, _ = subject.abstract(dtype)
    assert (y.shape[1:], y.dtype) == ((5, WIDTH), dtype)
    assert (stepped.shape, stepped.dtype) == ((3, 1, WIDTH), dtype)


def test_no_gradient_comes_from_the_future_and_some_from_the_past(subject):
    assert finite(subject.trained)
    for t, matters in zip(BEFORE, subject.reached("whole"), strict=True):
        assert not matters[t + 1 :].any(), t
        assert matters[t], t
        assert t == 0 or matters[:t].any(), t


def test_nothing_crosses_documents(subject):
    ids = np.asarray(layout(PACKED).segment_ids)[0]
    for t, matters in zip(BORDERS, subject.reached("packed"), strict=True):
        assert not matters[ids != ids[t]].any(), t
        assert matters[t], t


def test_packed_documents_equal_separate_ones(subject):
    packed, start = subject.y("packed")[0], 0
    for size, alone in zip(SEGMENTS, subject.y("alone"), strict=True):
        assert_close(packed[start : start + size], alone[:size])
        start += size


def test_padding_is_inert(subject):
    changed = subject.y("changed")[0]
    np.testing.assert_array_equal(subject.y("packed")[0][REAL], changed[REAL])
    assert np.isfinite(changed).all()
    assert not subject.reached("changed")[0][~REAL].any()


def test_row_of_padding_is_finite(subject):
    y, params, x = subject.trained
    assert finite(params, ROWS.of("padding", y), ROWS.of("padding", x))


def test_repeated_step_equals_the_call(subject):
    _, stepped, _, _ = subject.decoded
    assert_close(stepped[2], subject.y("whole")[0])


def test_prefill_of_left_padded_prompts_then_step_equals_the_call(subject):
    y, stepped, _, _ = subject.decoded
    for row, (n, expected) in enumerate(zip(PROMPTS, (subject.y("whole")[0], subject.y("short")[0]), strict=True)):
        assert_close(y[row, max(PROMPTS) - n :], expected[:n])
        assert_close(stepped[row, :STEPS], expected[n : n + STEPS])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_keeps_its_shape_and_has_the_stated_bytes(subject, dtype):
    _, _, (empty, filled, stepped) = subject.abstract(dtype)
    assert empty == filled == stepped
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(empty))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(empty))
    assert size == 3 * subject.config.state_bytes(WIDTH, LENGTH, dtype)


def test_num_params_equals_the_initialised_tree(subject):
    params = nnx.to_flat_state(nnx.state(subject.mixer, nnx.Param))
    belongs = lambda path: subject.case.sigma_reparam is None or path[-1] != "gain"  # gains belong to the model's option
    assert subject.config.num_params(WIDTH) == sum(p[...].size for path, p in params if belongs(path))


def test_flops_equal_those_of_the_traced_training_pass(plain_subject, monkeypatch):
    length = 12
    at = common.layout((length,), length=length)
    run = lambda variables, x: plain_subject.program.mixer(variables)(x, at=at, carry={}).y
    counted = count_flops(monkeypatch, run, plain_subject.variables, ROWS.x[:1, :length])
    assert plain_subject.config.flops(WIDTH, length) == pytest.approx(counted / length, rel=1e-12)


def test_implied_attention_reproduces_the_head_outputs(plain_subject):
    at = layout(SEGMENTS, ())
    if not isinstance(plain_subject.mixer, HeadMixer) or plain_subject.config.opaque:
        with pytest.raises(NotImplementedError, match="implied attention"):
            jax.eval_shape(lambda x: plain_subject.mixer.implied_attention(x, at=at), ROWS.x[:2])
        return
    (a, v, o), rows = plain_subject.looked[2], np.asarray(PROBES.pick_rows(LENGTH))
    assert (a.shape, a.dtype) == ((2, plain_subject.config.head_count(WIDTH), len(rows), LENGTH), jnp.float32)
    v = np.repeat(v, a.shape[1] // v.shape[2], axis=2)
    assert_close(np.einsum("hrs,shv->rhv", a[0], v[0])[REAL[rows]], o[0][rows][REAL[rows]])
    ids = np.asarray(at.segment_ids)
    visible = (ids[:, rows, None] == ids[:, None]) & (ids > 0)[:, None] & np.tri(LENGTH, dtype=bool)[None, rows]
    assert not np.moveaxis(a, 1, -1)[~visible].any()


@of_families
def test_eight_devices_equal_one(subject):
    mesh, placed = meshes.make_mesh(MESH), []
    for path, variable in nnx.to_flat_state(subject.variables):
        sharding = meshes.sharding(mesh, variable.get_metadata()["axes"], variable.shape, str(path))
        placed.append((path, variable.replace(jax.device_put(variable[...], sharding))))
    rows = meshes.batch_sharding(mesh, len(ROWS.x), LENGTH, 1)
    batch = jax.tree.map(lambda a: jax.device_put(a, rows), (ROWS.x, ROWS.at, ROWS.cotangent))
    y, params, x = subject.program.sharded(nnx.from_flat_state(placed), *batch)
    expected, wanted, wanted_x = subject.trained
    assert len(y.sharding.device_set) == 8
    real = np.asarray(ROWS.at.segment_ids) > 0
    assert_close(np.asarray(y)[real], np.asarray(expected)[real])
    assert_close(np.asarray(x)[real], np.asarray(wanted_x)[real])
    size = lambda a: float(np.sqrt(np.mean(np.square(np.asarray(a)))))
    rounding = bound("float32") * max(size(leaf) for leaf in jax.tree.leaves(wanted))
    pairs = [
        (path, np.asarray(got[...]), np.asarray(want[...]))
        for (path, got), (_, want) in zip(nnx.to_flat_state(params), nnx.to_flat_state(wanted), strict=True)
    ]
    scalars = [
        pair for pair in pairs if pair[2].ndim == 0
    ]  # a gain's gradient is one sum, which may all but cancel: all gains as one
    pairs = [pair for pair in pairs if pair[2].ndim] + ([("gains", *map(np.stack, list(zip(*scalars))[1:]))] if scalars else [])
    for path, got, want in pairs:
        if size(want) < rounding:  # zero but for rounding, as of a router whose one choice is normalised to 1
            assert size(got) < rounding, path
        else:
            assert_close(got, want, err_msg=str(path))


def test_config_survives_json_and_is_hashable(plain_subject):
    again = decode(MixerConfig, json.loads(json.dumps(encode(plain_subject.config))))
    assert again == plain_subject.config
    assert hash(again) == hash(plain_subject.config)


@of_families
def test_gradients_are_finite_in_bfloat16(subject):
    half = program(subject.case.graph("bfloat16"))
    x = ROWS.x[:2, :24].astype(jnp.bfloat16)
    y, *gradients = half.train(subject.variables, x, common.layout((11, 9), (24,), length=24), jnp.ones_like(x))
    assert y.dtype == jnp.bfloat16
    assert finite(y, gradients)


def test_it_leaves_in_the_carry_what_it_says(plain_subject):
    mixed = jax.eval_shape(
        lambda v, x: plain_subject.program.mixer(v)(x, at=layout((LENGTH,)), carry={}).carry, plain_subject.variables, ROWS.x[:1]
    )
    uses = {use.name: use for use in plain_subject.config.carries(WIDTH) if use.use != "model"}
    assert {name: a.shape for name, a in mixed.items()} == {n: (1, LENGTH, *use.like) for n, use in uses.items()}


def test_probe_shows_finite_statistics_of_the_right_shape_and_changes_nothing(plain_subject):
    y, shown, _ = plain_subject.looked
    assert_close(y[0][REAL], plain_subject.y("packed")[0][REAL])
    heads = plain_subject.config.head_count(WIDTH)
    declared = {statistic.name: statistic for probe in PROBES.probes for statistic in probe.statistics}
    simple = isinstance(plain_subject.mixer, HeadMixer) and not plain_subject.config.opaque
    for name, value in shown.items():
        statistic = declared[name]
        size = () if statistic.size is None else (statistic.size(PROBES.config),)
        assert (value.shape, value.dtype) == ((heads,) * (statistic.per == "head") + size, jnp.float32), name
        if name == "head_concentration" and np.all(shown["head_load"] == 1):
            assert np.isnan(value), "there is none where every token uses all"
            continue
        if name.startswith("selection_") and np.isnan(value).all():
            continue  # there is none where no row that is looked at leaves tokens out
        assert np.isfinite(value).all() if simple else np.isfinite(value).any() and not np.isinf(value).any(), name
    if simple:
        assert {"entropy", "entropy_ratio", "sink", "sink_rate", "value_drain"} <= set(shown)


def test_heads_that_read_a_state_show_it_and_others_have_none(plain_subject):
    kinds = np.asarray(plain_subject.config.head_kinds(WIDTH))
    assert len(kinds) == plain_subject.mixer.num_heads
    for name in ("state_norm", "write_strength", "decay_horizon"):
        shown = plain_subject.looked[1].get(name, np.full(len(kinds), np.nan))
        np.testing.assert_array_equal(np.isfinite(shown), kinds == "state", err_msg=name)


def test_statistics_do_not_see_padding(plain_subject):
    _, changed, _ = plain_subject.look(jnp.where(REAL[:, None], ROWS.second, 5.0), SEGMENTS, ())
    assert changed.keys() == plain_subject.looked[1].keys()
    for name, value in plain_subject.looked[1].items():
        np.testing.assert_array_equal(changed[name], value, err_msg=name)


def test_statistics_do_not_see_rows_of_padding(plain_subject):
    _, both, _ = plain_subject.look(ROWS.second, SEGMENTS, SEGMENTS)
    for name, value in both.items():
        present = np.isfinite(value)
        assert_close(np.asarray(plain_subject.looked[1][name])[present], np.asarray(value)[present], err_msg=name)
