"""A mixture in a run: the loss of each source is what a separate evaluation finds, through resumes and curricula."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from plait.configs.probe import ProbeConfig
from plait.data.loader import build_data
from plait.data.mixture.config import SourceConfig
from plait.data.tasks.base import TASKS
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, program_of, random_batch, tiny, write_corpus
from plait.train.checkpoint import Checkpoints
from plait.train.loop import train
from plait.train.loss import token_losses
from plait.train.probes.base import Probes
from plait.train.run import RunError, opened
from plait.train.run_folder.contents import CHECKPOINTS
from plait.train.run_folder.lines import METRICS
from plait.train.scoring.evaluate import Evaluator
from plait.train.step import make_step


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    sources = {
        "web": SourceConfig(source=str(write_corpus(folder / "web")), weight=3.0, curriculum="1@3"),
        "recall": SourceConfig(task=TASKS["copying"](), weight=1.0),
    }
    changes = {
        "steps": 4,
        "model.num_layers": 1,
        "data.sources": sources,
        "data.seq_len": 32,
        "eval_every": 2,
        "checkpoint_every": 2,
        "keep_last": 3,
    }
    return tiny({**changes, "eval_batches": 2, "data.cache_dir": str(folder / "cache"), "out": str(folder / "run")})


def numbers(folder: Path) -> list[dict]:
    """Lines of metrics without what tells the time."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "time/", "throughput/"))} for line in lines]


def test_a_steps_loss_by_source_is_that_of_its_rows_alone(compile_cache):
    sources = {name: SourceConfig(weight=1.0) for name in ("a", "b", "c")}
    setup = program_of(tiny({"data.sources": sources, "optimizer.accumulate": 2}))
    batch, of = random_batch(), np.array([2, 0, 2, 0], np.int32)
    state = setup.fresh()
    nll = quick_jit(lambda batch: token_losses(setup.blueprint.build(state.params, state.buffers), batch)[0])(batch)
    observer = Probes(ProbeConfig(only="dormant_by_source"))
    _, metrics = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, observer))(state, batch, sources=of)
    rows = np.stack([np.asarray(nll).sum(1), batch.loss_mask.sum(1)], 1)
    expected = np.stack([rows[of == source].sum(0) for source in range(3)])
    assert_close(metrics["sources"], expected)
    for layer in metrics["statistics"]:  # of the last micro-batch: rows 1 and 3
        assert np.isfinite(layer["dormant_by_source"]).all(0).tolist() == [True, False, False]
    assert_close(metrics["sources"][:, 0].sum() / metrics["sources"][:, 1].sum(), metrics["loss/train"])


def test_a_run_tells_each_source_and_goes_on_exactly(config, compile_cache):
    train(config)
    folder = Path(config.folder)
    whole = numbers(folder)
    steps = [line for line in whole if "loss/train" in line]
    for line in steps:
        tokens = {name: line[f"tokens/source/{name}"] for name in ("web", "recall")}
        assert sum(tokens.values()) == line["tokens"]
    last = [line for line in whole if "loss/val" in line][-1]
    trained = opened(folder)
    data = build_data(config.data, folder)
    for name, part in data.parts.items():  # a separate evaluation, in full
        alone = Evaluator(trained.program.blueprint, trained.program.mesh, part)(
            trained.params,
            trained.buffers,
            part.val,
            max(1, round(2 * len(part.val) / sum(len(p.val) for p in data.parts.values()))),
        )
        assert_close(np.float32(last[f"loss/val_source/{name}"]), np.float32(alone.loss))
    for step in Checkpoints(folder / CHECKPOINTS, read_only=True).steps():
        if step > 2:
            shutil.rmtree(folder / CHECKPOINTS / str(step))
    train(changed(config, {"resume": True}))
    assert numbers(folder) == whole


def test_a_mixture_that_ends_before_the_run_is_refused(config, tmp_path):
    sources = {**config.data.sources, "web": SourceConfig(source=config.data.sources["web"].source, weight=1.0, max_epochs=0.01)}
    short = {name: sources[name] for name in ("web",)}
    with pytest.raises(RunError, match=r"steps=400 of data\.batch_size=4 rows are more than the \d+ that data\.sources give"):
        train(changed(config, {"data.sources": short, "steps": 400, "out": str(tmp_path / "run")}))
