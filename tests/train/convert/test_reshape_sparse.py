"""The reshape `sparse`: full attention to what leaves tokens out and back, without a change of parameters."""

import json

import pytest

from plait.models.mixers.base import MIXERS
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.sparse.moba import MoBAConfig
from plait.tests.train.common import different_arrays
from plait.tests.train.convert.reshapes import LENGTH, layer, make_run, model_of, reshaped
from plait.train.convert.reshapes.sparse import Sparse, kinds
from plait.train.convert.weights import ConvertError
from plait.train.run import opened


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A run of softmax attention with shared key heads, not to be written to."""
    return make_run(tmp_path_factory.mktemp("grouped") / "run", model_of(num_kv_heads=2))


def test_a_model_goes_to_chosen_blocks_and_back(grouped):
    found, new = reshaped(grouped, Sparse(pattern="moba*2,softmax", block_size=4, top_k=2), "moba")
    model = new.program.config.model
    assert model.layers == ("moba", "moba", "softmax") and found.parameters[0] == found.parameters[1]
    assert model.mixers["moba"] == MoBAConfig(num_heads=6, num_kv_heads=2, head_dim=4, block_size=4, top_k=2)
    assert found.moved.largest > 0.01, "two blocks of four are left out"
    _, less = reshaped(grouped.with_name("moba"), Sparse(pattern="moba", top_k=1), "less")
    assert {mixer.top_k for mixer in less.program.config.model.layer_mixers} == {1}
    _, back = reshaped(grouped.with_name("moba"), Sparse(pattern="softmax"), "back")
    old = opened(grouped)
    assert back.program.config.model.layer_mixers == old.program.config.model.layer_mixers
    assert all(different_arrays(layer(old, i), layer(back, i)) == [] for i in range(3))


def test_every_mixer_with_the_parameters_can_take_the_place(grouped):
    """Of all sparse mixers those that have parameters of their own are left: they are trained from the start."""
    others = {"dma", "dsa", "hcam", "nsa", "routing", "sea"}
    assert kinds().keys() == {"softmax"} | {name for name, kind in MIXERS.all().items() if kind.kind == "sparse"} - others
    for name in kinds().keys() - {"softmax"}:
        _, new = reshaped(grouped, Sparse(pattern=f"{name},softmax*2"), f"to_{name}")
        mixer = new.program.config.model.layer_mixers[0]
        assert (mixer.name, mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) == (name, 6, 2, 4)
        assert different_arrays(layer(opened(grouped), 0), layer(new, 0)) == []


def test_a_layer_has_the_rules_that_a_plan_gives_its_number(grouped, tmp_path):
    plan = tmp_path / "plan.json"
    alphas = [[float(i + h) for h in range(6)] for i in range(3)]
    plan.write_text(json.dumps({"alphas": alphas, "betas": [[0.25] * 6] * 3}))
    _, new = reshaped(grouped, Sparse(pattern="softmax,moa*2", plan=str(plan), num_sink_tokens=1), "planned")
    first, second, third = new.program.config.model.layer_mixers
    assert first.name == "softmax" and second.alphas == tuple(alphas[1]) and third.alphas == tuple(alphas[2])
    assert (second.plan, second.length, second.num_sink_tokens) == (None, LENGTH, 1)
    with pytest.raises(ValueError, match=r"plan='.*' has 6 alphas in layer 0, and num_heads=3"):
        reshaped(make_run(tmp_path / "three", model_of(num_heads=3)), Sparse(pattern="moa", plan=str(plan)))


def test_options_that_both_have_stay_and_others_are_refused(tmp_path):
    run = make_run(tmp_path / "run", model_of(qk_norm=True, window_size=8))
    _, new = reshaped(run, Sparse(pattern="power", block_size=2))
    mixer = new.program.config.model.mixers["power"]
    assert (mixer.qk_norm, mixer.window_size, mixer.block_size) == (True, None, 2)
    with pytest.raises(ConvertError, match=r"model.mixers.softmax.qk_norm=True, which moba has not"):
        reshaped(run, Sparse(), "chosen")
    with pytest.raises(ConvertError, match=r"qk_norm=True, which moba has not"):
        reshaped(tmp_path / "new", Sparse(), "chosen")


def test_windows_of_layers_that_stay_are_left(tmp_path):
    near = model_of(window_size=8).mixers["softmax"]
    model = model_of(pattern="softmax*2,softmax/near", mixers={"softmax": model_of().mixers["softmax"], "softmax/near": near})
    run = make_run(tmp_path / "run", model)
    _, new = reshaped(run, Sparse(pattern="moba,softmax*2", block_size=4))
    assert [mixer.name for mixer in new.program.config.model.layer_mixers] == ["moba", "softmax", "softmax"]
    assert new.program.config.model.layer_mixers[1:] == model.layer_mixers[1:]
    with pytest.raises(ConvertError, match=r"pattern='softmax' changes no layer"):
        reshaped(run, Sparse(pattern="softmax"), "none")
    with pytest.raises(ConvertError, match=r"pattern='moba,softmax\*2' changes no layer"):
        reshaped(tmp_path / "new", Sparse(pattern="moba,softmax*2", block_size=4), "none")


def test_what_is_around_a_mixer_stays(tmp_path):
    softmax = model_of().mixers["softmax"]
    run = make_run(tmp_path / "run", model_of(pattern="moh+softmax", mixers={"moh+softmax": MoHConfig(mixer=softmax)}))
    _, new = reshaped(run, Sparse(block_size=4, top_k=2))
    mixer = new.program.config.model.mixers["moh+moba"]
    assert mixer.mixer.block_size == 4 and mixer.router == MoHConfig().router
