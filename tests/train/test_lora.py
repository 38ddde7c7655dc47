"""Adapters trained in place of a model: the base stays, whatever its layers are, and what comes out is one model again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from plait.kernels import Tokens
from plait.launch import main
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.layers.lora import LoRAConfig
from plait.models.lm import fold
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, different_arrays, hybrid, program_of, random_batch, tiny
from plait.train import origin as origins
from plait.train import run as runs
from plait.train.state import Blueprint
from plait.train.step import make_step

EVERY_ROLE = "matrix,gate,router,head"
EXPERTS = MoEConfig(num_experts=4, top_k=2, hidden_dim=8, num_shared_experts=1, balance_bias=0.01)


def tuned(targets=EVERY_ROLE, **more):
    """A linear and a Mixture-of-Head softmax layer, twice and stacked, with experts; only adapters are trained."""
    lora = LoRAConfig(rank=3, targets=targets, scaling="rslora")
    changes = {"model.num_layers": 4, "model.channel_mixer": EXPERTS, "model.lora": lora, "init_from": "runs/base", **more}
    return changed(hybrid(), changes)


KINDS = {"plain": {}, "with gains": {"model.sigma_reparam": "one"}}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def trained(request, compile_cache):
    """The setup, the state at step 0, that after two steps, and the metrics of the first."""
    setup = program_of(tuned(**request.param))
    start = setup.fresh()
    step = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, None))
    state, metrics = step(start, random_batch())
    state, _ = step(state, random_batch(seed=1))
    return setup, start, state, metrics


def logits_of(model):
    return quick_jit(lambda model, ids: model(Tokens(ids=ids))[0])(model, random_batch(seed=2).tokens)


def test_nothing_but_adapters_moves(trained):
    _, start, state, _ = trained
    assert different_arrays(start.buffers, state.buffers) == []
    assert len(different_arrays(start.params, state.params)) == len(start.params)
    assert {name.rpartition(".")[2] for name in state.params} == {"lora_a", "lora_b"}


def test_the_optimizer_holds_moments_of_adapters_alone(trained):
    _, _, state, _ = trained
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * sum(value.size for value in state.params.values())


def test_step_0_is_the_base(trained):
    setup, start, _, _ = trained
    base = changed(setup.config, {"model.lora": LoRAConfig(), "init_from": None})
    blueprint = Blueprint(base)
    every = {**start.params, **start.buffers}
    params, buffers = ({name: every[name] for name in part} for part in blueprint.shapes())
    assert_close(logits_of(setup.blueprint.build(start.params, start.buffers)), logits_of(blueprint.build(params, buffers)))


def test_merged_weights_are_the_same_function(trained):
    setup, start, state, _ = trained
    model = setup.blueprint.build(state.params, state.buffers)
    merged = fold(model)
    assert merged.config.lora.rank is None and merged.config.sigma_reparam is None
    assert_close(logits_of(merged), logits_of(model))
    first = logits_of(setup.blueprint.build(start.params, start.buffers))
    assert np.abs(logits_of(merged) - first).max() > 1e-3 * np.abs(first).max()


def settled(config):
    return dataclasses.replace(config, model=config.model.with_vocab(64))


def test_every_dense_layer_of_every_kind_can_be_hit_and_what_is_not_is_said():
    having, without = map(dict, Blueprint(settled(tuned())).products())
    names = {name.rpartition(".")[2] for name in having}
    assert {"q", "k", "v", "o", "a", "b", "gate", "up", "down", "router", "head"} <= names
    assert {"shared.gate", "inner.q"} <= {".".join(name.split(".")[-2:]) for name in having}
    assert set(without.values()) <= {"embedding", "conv", "vector", "decay"} and "embedding" in without
    having, without = map(dict, Blueprint(changed(settled(tuned()), {"model.lora.targets": "gate"})).products())
    assert set(having.values()) == {"gate"} and {"matrix", "router", "head"} <= set(without.values())


REFUSED = {
    "no base": ({"init_from": None}, r"model.lora.rank=3 trains adapters .* init_from is None; .* --init-from RUN"),
    "no rank": ({"model.lora.rank": 0}, "rank=0 must be a whole number from 1 to 16384"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(tuned(), changes)


def test_roles_that_no_layer_of_the_model_has_are_refused():
    config = changed(tiny(), {"model.lora": LoRAConfig(rank=2, targets="router,gate"), "init_from": "runs/base"})
    with pytest.raises(
        ValueError, match=r"model.lora.targets='router,gate' is the role of no dense layer .* use one of head, matrix"
    ):
        program_of(config)


def do(*words):
    assert main([*map(str, words)]) == 0


def test_a_published_model_is_tuned_and_handed_back(compile_cache, corpus, tmp_path, caplog):
    train = ["--mesh.data", "1", "--data.batch-size", "8", "--probe-every", "None", "--eval-batches", "1"]
    run, folder, imported, run_b, back, again = (
        tmp_path / name for name in ("run", "model", "imported", "tuned", "back", "again")
    )
    options = ["--steps", "2", "--optimizer.warmup-steps", "1", "--data.tokenizer", "byte", "--model.pattern", "softmax"]
    train += ["--data.source", corpus]
    do("train", "lm_tiny", *train, *options, "--out", run)
    do("convert", "export", run, folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    do("convert", "import", folder, imported, "--seq-len", 64)
    lora = ["--steps", "3", "--model.lora.rank", "2", "--optimizer.learning-rate", "1e-2"]
    do("train", "--init-from", imported, *train, *lora, "--out", run_b)
    facts = json.loads((run_b / "environment.json").read_text())
    assert facts["num_trained_params"] < facts["num_params"] and "stack.periods.0.mixer.q" in facts["adapters"]["of"]
    assert "left without: embedding (embedding), head (head)" in caplog.text
    do("convert", "export", run_b, back)
    assert json.loads((back / "generation_config.json").read_text()) == {"temperature": 0.7}
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    before, after = (load_file(one / "model.safetensors") for one in (folder, back))
    changed_names = {name for name, value in after.items() if not np.array_equal(value, before[name])}
    assert changed_names == {name for name in before if "_proj" in name}
    do("convert", "import", back, again, "--seq-len", 64)
    scores, other = [], tmp_path / "other.txt"
    other.write_text("What neither of the two was trained on is scored whole. " * 40)
    for one in (run_b, again):
        scored = tmp_path / f"scores-{one.name}.json"
        do("eval", one, "--data.source", other, "--out", scored)
        scores.append(json.loads(scored.read_text())["ppl"]["loss"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    do("report", run_b)
    # A whole model goes on from the adapters: they are merged.
    config = origins.parse_run(
        ["--init-from", str(run_b), "--model.lora.rank", "None", "--mesh.data", "1", "--out", str(tmp_path / "on")]
    )
    setup = runs.set_up(origins.settled(config))
    state = origins.begin(setup, config.init_from)
    for name, value in Blueprint(setup.config).split(fold(runs_model(run_b)))[0].items():
        assert_close(state.params[name], value, err_msg=name)


def runs_model(folder):
    trained = runs.opened(folder)
    return trained.program.blueprint.build(trained.params, trained.buffers)
