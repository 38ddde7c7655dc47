"""Reshapes: where a reshape changes nothing the logits say so, and what it makes is what NumPy makes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from plait.configs.mesh import MeshConfig
from plait.kernels import Tokens
from plait.launch import main
from plait.models.layers.layer_inputs import LayerInputsConfig
from plait.models.mixers.full.diff import DiffConfig
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.models.positions.rotary import RotaryConfig
from plait.models.positions.rotary_proportional import ProportionalRotaryConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close
from plait.tests.train.common import different_arrays
from plait.tests.train.convert.reshapes import LENGTH, layer, logits, make_run, model_of, reshaped
from plait.train.convert.reshapes.base import RESHAPES, Subject
from plait.train.convert.reshapes.depth import Depth
from plait.train.convert.reshapes.kv_heads import KVHeads
from plait.train.convert.reshapes.mla import MLA
from plait.train.convert.reshapes.moh import MoH
from plait.train.convert.reshapes.rope import Rope
from plait.train.convert.reshapes.sparse import Sparse
from plait.train.convert.reshapes.vocab import Vocab
from plait.train.convert.reshapes.window import Window
from plait.train.convert.weights import ConvertError
from plait.train.run import opened

HEADS, WIDTH = 6, 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of plain softmax attention, not to be written to."""
    return make_run(tmp_path_factory.mktemp("plain") / "run", model_of())


IDENTITIES = {
    "as many key heads": KVHeads(num_kv_heads=HEADS),
    "all heads used": MoH(num_shared_heads=2, top_k=4),
    "all heads used by a learned router": MoH(num_shared_heads=2, top_k=4, router="learned"),
    "no shared head, all used": MoH(num_shared_heads=0, top_k=6),
    "all layers": Depth(pattern="keep"),
    "window of the length": Window(window_size=LENGTH),
    "all blocks chosen": Sparse(pattern="moba*2,softmax", block_size=4, top_k=4),
    "near enough, and landmarks": Sparse(pattern="neighborhood,landmark,softmax", window_size=LENGTH),
    "factor 1, linear": Rope(method="linear", factor=1.0),
    "factor 1, ntk": Rope(method="ntk", factor=1.0),
    "factor 1, yarn": Rope(method="yarn", factor=1.0),
    "more ids": Vocab(vocab_size=300),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_changes_nothing_moves_no_logit(plain, name):
    reshape = IDENTITIES[name]
    found, new = reshaped(plain, reshape, name.replace(" ", "_"))
    old = opened(plain)
    assert found.moved.tokens == 2 * LENGTH
    if isinstance(reshape, KVHeads | Depth | Window):
        assert different_arrays(old.params, new.params) == [] and (found.moved.mean_kl, found.moved.largest) == (0, 0)
    if isinstance(reshape, Sparse):
        assert all(different_arrays(layer(old, i), layer(new, i)) == [] for i in range(3))
    assert_close(logits(new)[..., :260], logits(old))


def equal_in_groups(size):
    """Key and value heads that are alike in each group of `size`."""

    def edit(params):
        for path, array in params.items():
            axis = {"k.kernel": -1, "v.kernel": -1, "k.bias": -1, "v.bias": -1, "k_norm.scale": -1, "k_bias": -2, "v_bias": -2}
            name = path.partition("mixer.")[2]
            if (name in axis and array.shape[-1] > WIDTH) or name in ("k_bias", "v_bias", "value_scale"):
                at = axis.get(name, -1) % array.ndim
                channels = 1 if name == "value_scale" or axis[name] == -2 else WIDTH
                heads = np.moveaxis(array, at, 0).reshape(array.shape[at] // channels // size, size, channels, -1)
                heads[:] = heads[:, :1]
                array[...] = np.moveaxis(heads.reshape(np.moveaxis(array, at, 0).shape), 0, at)

    return edit


OPTIONS = {"qkv_bias": True, "qk_norm": True, "qk_norm_over": "width", "sink_bias": "kv", "value_scale": True}


@pytest.mark.parametrize(
    ("model", "size", "target"),
    [(OPTIONS, 3, 2), ({"num_kv_heads": 3, "qk_norm": True, "value_residual": True}, 3, 1)],
    ids=["MHA with all options to GQA", "GQA to MQA"],
)
def test_the_mean_of_equal_heads_is_each_of_them(model, size, target, tmp_path):
    run = make_run(tmp_path / "run", model_of(**model), equal_in_groups(size))
    found, new = reshaped(run, KVHeads(num_kv_heads=target))
    assert found.parameters[1] < found.parameters[0]
    heads = model.get("num_kv_heads", HEADS)
    assert found.state_bytes[0] - found.state_bytes[1] == 3 * 2 * LENGTH * (heads - target) * WIDTH * 4
    assert_close(logits(new), logits(opened(run)))


def test_heads_are_pooled_in_their_groups_as_by_hand(plain):
    _, new = reshaped(plain, KVHeads(num_kv_heads=2, layers=(0, 2)), "two of three layers")
    assert new.program.config.model.layers == ("softmax/grouped", "softmax", "softmax/grouped")
    for index in (0, 2):
        before, after = layer(opened(plain), index), layer(new, index)
        for name in ("mixer.k.kernel", "mixer.v.kernel"):
            heads = [before[name][:, WIDTH * h : WIDTH * (h + 1)] for h in range(HEADS)]
            by_hand = np.concatenate([sum(heads[:3]) / 3, sum(heads[3:]) / 3], axis=1)
            assert_close(after[name], by_hand, dtype="float32")
        np.testing.assert_array_equal(after["mixer.q.kernel"], before["mixer.q.kernel"])
    np.testing.assert_array_equal(layer(new, 1)["mixer.k.kernel"], layer(opened(plain), 1)["mixer.k.kernel"])


def test_groups_that_follow_their_keys_begin_as_equal_ones(plain):
    _, mean = reshaped(plain, KVHeads(num_kv_heads=2), "mean")
    _, driven = reshaped(plain, KVHeads(num_kv_heads=2, grouping="key_driven"), "driven")
    assert driven.program.config.model.pattern == "kdgqa"
    assert_close(logits(driven), logits(mean))


def test_moh_is_as_published_by_default(plain):
    """Half of the heads shared, half of the others used, the norms of queries choose, and no parameter is new."""
    found, new = reshaped(plain, MoH(), "published")
    mixer = new.program.config.model.layer_mixers[0]
    assert (mixer.num_shared_heads, *mixer.split(HEADS), mixer.router) == (3, 3, 2, "query_norm")
    assert found.parameters[0] == found.parameters[1] and found.moved.largest > 0
    assert not any("router" in path for path in new.params)


YARN = YarnRotaryConfig(fraction=0.5, factor=4.0, original_len=8)
EXACT = {
    "no positions, MHA": ({"positions": None}, None, 20),
    "no positions, GQA, a scale": ({"positions": None, "num_kv_heads": 2, "scale": 0.7}, None, 16),
    "rotary, MQA": ({"num_kv_heads": 1}, None, 8),
    "half of the channels by YaRN, MQA": ({"num_kv_heads": 1, "positions": YARN}, None, 8),
    "neighbours turned, key heads alike": ({"positions": RotaryConfig(interleaved=True)}, equal_in_groups(6), 20),
    "fastest pairs turned, key heads alike": ({"positions": ProportionalRotaryConfig(fraction=0.5)}, equal_in_groups(6), 20),
}


@pytest.mark.parametrize("name", usually(EXACT, "no positions, GQA, a scale", "half of the channels by YaRN, MQA"))
def test_mla_of_full_rank_is_the_same_function(name, tmp_path):
    options, edit, rank = EXACT[name]
    run = make_run(tmp_path / "run", model_of(**options), edit)
    _, new = reshaped(run, MLA(kv_rank=rank))
    assert_close(logits(new), logits(opened(run)))


@pytest.mark.parametrize("rank", [20, 5])
def test_mla_is_the_best_of_its_rank_around_the_shared_key(plain, rank):
    """What is left of the kernels is what their singular values say; each frequency is mixed alike, and shares the most that it can."""
    _, new = reshaped(plain, MLA(kv_rank=rank), f"rank{rank}")
    old, after = layer(opened(plain), 1), layer(new, 1)
    heads = lambda a: a.reshape(len(a), -1, WIDTH).swapaxes(0, 1)  # [H, D, K]
    q, k, v = (heads(old[f"mixer.{name}.kernel"]) for name in "qkv")
    queries = after["mixer.q.kernel"].reshape(20, HEADS, 2 * WIDTH).swapaxes(0, 1) / np.sqrt(2 * WIDTH) * np.sqrt(WIDTH)
    assert_close(queries[..., :WIDTH], q, dtype="float32")
    mix = (queries[..., WIDTH:] / q).mean(1)  # [H, K]
    assert_close(queries[..., WIDTH:], q * mix[:, None], dtype="float32")
    shared = after["mixer.k_rope.kernel"]
    for pair in (0, 1):
        both = [pair, pair + WIDTH // 2]
        assert_close(mix[:, both[0]], mix[:, both[1]], dtype="float32")
        assert_close(np.sum(mix[:, pair] ** 2), 1.0, dtype="float32")
        stacked = k[:, :, both].reshape(HEADS, -1)
        assert_close(np.sum(shared[:, both] ** 2), np.linalg.svd(stacked)[1][0] ** 2, dtype="float32")
    rest = k - mix[:, None] * shared
    down = after["mixer.kv_down.kernel"]
    k_nope, v_made = (heads(down @ after[f"mixer.{name}.kernel"]) for name in ("k_up", "v_up"))
    balance = np.linalg.norm(v) / np.linalg.norm(rest)
    whole = np.concatenate([*(balance * rest), *v], axis=1)
    error = np.concatenate([*(balance * (k_nope - rest)), *(v_made - v)], axis=1)
    lost = np.sum(np.linalg.svd(whole)[1][rank:] ** 2)
    assert_close(np.sum(error**2) + 1.0, lost + 1.0, dtype="float32")


def test_layers_are_dropped_and_the_others_stay(tmp_path):
    mixers = {"softmax": model_of().mixers["softmax"], "diff": DiffConfig(num_heads=4, head_dim=4)}
    run = make_run(tmp_path / "run", model_of(num_layers=5, pattern="softmax*2,diff*3", mixers=mixers))
    old, (_, listed), (found, patterned) = (
        opened(run),
        reshaped(run, Depth(keep=(1, 3, 4)), "list"),
        reshaped(run, Depth(pattern="drop@0,2; keep"), "pattern"),
    )
    assert listed.program.config.model.layers == ("softmax", "diff", "diff")
    assert different_arrays((listed.params, listed.buffers), (patterned.params, patterned.buffers)) == []
    for index, origin in enumerate((1, 3, 4)):
        assert different_arrays(layer(old, origin), layer(listed, index)) == []
    starts = np.asarray([v for name, v in sorted(listed.buffers.items()) if name.endswith("start")]).ravel()
    assert_close(starts, 0.8 - 0.6 * np.exp(-0.3 * np.array([3, 4])), dtype="float32")  # as deep as they were
    assert "layers: 1, 3, 4 of 0 to 4" in found.changed


def test_the_first_layer_with_a_value_residual_is_the_first_of_those_left(tmp_path):
    run = make_run(tmp_path / "run", model_of(value_residual=True))
    _, new = reshaped(run, Depth(keep=(1, 2)))
    assert [bool(x) for x in np.ravel([v for name, v in new.buffers.items() if name.endswith("is_first")])] == [True, False]


def test_a_window_comes_and_goes(plain):
    found, windowed = reshaped(plain, Window(window_size=3, num_sink_tokens=1, layers=(1,)), "windowed")
    assert windowed.program.config.model.pattern == "softmax,softmax/window" and found.moved.largest > 0
    _, again = reshaped(plain.with_name("windowed"), Window(window_size=None), "again")
    assert_close(logits(again), logits(opened(plain)))


def test_new_ids_are_the_mean_of_the_old_and_unused_ones_go(plain):
    _, more = reshaped(plain, Vocab(vocab_size=263), "more")
    old = opened(plain)
    for path, axis in {"embedding": 0, "head.kernel": 1}.items():
        before, after = (np.moveaxis(np.asarray(run.params[path], np.float64), axis, 0) for run in (old, more))
        np.testing.assert_array_equal(after[:260], before)
        for new in range(260, 263):
            assert_close(after[new], before.mean(0), dtype="float32")
    _, fewer = reshaped(plain, Vocab(vocab_size=257), "fewer")
    assert_close(logits(fewer), logits(old)[..., :257])


def test_positions_pressed_together_are_those_of_before(plain):
    """A model stretched by 2 gives at positions 0, 2, 4, ... what it gave at 0, 1, 2, ..."""
    _, new = reshaped(plain, Rope(method="linear", factor=2.0), "pressed")
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 257, (2, LENGTH)), jnp.int32)
    apart = Tokens(ids, jnp.ones_like(ids), jnp.broadcast_to(2 * jnp.arange(LENGTH), ids.shape))
    model = new.program.blueprint.build(new.params, new.buffers)
    assert_close(model(apart)[0], logits(opened(plain)))


def test_what_is_said_of_the_logits_is_so(plain):
    found, new = reshaped(plain, KVHeads(num_kv_heads=3), "said", seed=7)
    ids = np.random.default_rng(7).integers(0, 257, (2, LENGTH), np.int32)
    before, after = (np.asarray(logits(run, ids), np.float64) for run in (opened(plain), new))
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (before, after)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    assert_close(found.moved.mean_kl, kl, dtype="float32")
    assert_close(found.moved.largest, np.abs(after - before).max(), dtype="float32")
    written = json.loads((plain.with_name("said") / "reshape.json").read_text())
    assert written["moved"]["mean_kl"] == found.moved.mean_kl and written["reshape"]["num_kv_heads"] == 3
    assert written["parameters"] == [20620, 20620 - 3 * 2 * 20 * 3 * WIDTH]


def test_inputs_of_layers_grow_with_the_ids_and_need_all_layers(tmp_path):
    model = model_of(layer_inputs=LayerInputsConfig(dim=4))
    run = make_run(tmp_path / "run", model)
    _, new = reshaped(run, Vocab(vocab_size=300))
    assert_close(logits(new)[..., :260], logits(opened(run)))
    with pytest.raises(ConvertError, match=r"model\.layer_inputs\.dim=4: .*; keep all layers"):
        Depth(pattern="keep,drop,keep").model(Subject(model, 260, LENGTH))


def test_sigma_reparam_is_folded(tmp_path):
    run = make_run(tmp_path / "run", model_of(sigma_reparam="spectral"))
    found, new = reshaped(run, Window(window_size=LENGTH))
    assert new.program.config.model.sigma_reparam is None and 'sigma_reparam: "spectral" -> null' in found.changed
    assert_close(logits(new), logits(opened(run)))


@pytest.mark.parametrize("reshape", [KVHeads(num_kv_heads=2), MLA(kv_rank=8), Vocab(vocab_size=264)], ids=lambda one: one.name)
def test_several_devices_make_the_same_bits(plain, reshape, tmp_path):
    spread = make_run(tmp_path / "run", model_of(), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    _, one = reshaped(plain, reshape, f"one_{reshape.name}")
    _, eight = reshaped(spread, reshape, "eight")
    assert different_arrays(one.params, eight.params) == []
    assert {len(a.sharding.device_set) for a in eight.params.values()} == {8}


def test_every_reshape_is_shown_and_documented():
    assert set(RESHAPES) == {"kv_heads", "moh", "mla", "depth", "window", "vocab", "rope", "linearize", "students", "sparse"}
    assert main(["list", "reshapes"]) == 0


def test_layers_that_share_bounds_stay(tmp_path):
    mixers = {"hgrn2": HGRN2Config(head_dim=4, lower_bounds="model")}
    run = make_run(tmp_path / "run", model_of(pattern="hgrn2", mixers=mixers))
    with pytest.raises(ConvertError, match="the layers read lower_bounds, which is of all 3 layers together"):
        reshaped(run, Depth(keep=(0, 1)))
