"""A run that begins as another did: with its numbers and its state up to one of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import uuid
from pathlib import Path

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.configs.files import read_json, write_atomically
from plait.train.remote.reading import run_here
from plait.train.run_folder import seal
from plait.train.run_folder.contents import BRANCH, CHECKPOINTS, CONFIG, ORIGIN, ORIGINALS, RunError, mark
from plait.train.run_folder.going_on import check_goes_on, checkpoint_steps, has_other_data
from plait.train.run_folder.lines import EVENTS, METRICS
from plait.train.run_folder.probe_files import PROBES

log = logging.getLogger("plait")

_TAKEN = (ORIGIN, METRICS, EVENTS, PROBES, "tokenizer", ORIGINALS)
"""What goes along beside the config and the checkpoint. Numbers of later steps go when the new run goes on from it; the report is made anew."""


@dataclasses.dataclass(frozen=True)
class Fork:
    """A checkpoint at which runs part."""

    run: Path
    step: int
    config: ExperimentConfig
    """Of the run that it is of."""

    @classmethod
    def of(cls, text: str) -> Fork:
        """That of RUN/checkpoints/STEP. Raises RunError where there is none that is whole."""
        path = run_here(text, "branch").expanduser()
        run = path.parent.parent
        if path.parent.name != CHECKPOINTS or not path.name.isdecimal() or not (run / CONFIG).is_file():
            raise RunError(f"branch={text!r} must be RUN/{CHECKPOINTS}/STEP of a training run")
        if not path.is_dir():
            there = ", ".join(map(str, checkpoint_steps(run)))
            raise RunError(
                f"branch={text!r} is not there; use one of the steps {there or 'of another run, as this one has none'}"
            )
        if (problem := seal.damage(path)) is not None:
            raise RunError(f"branch={text!r} {problem}; use another checkpoint")
        return cls(run, int(path.name), codec.load(ExperimentConfig, run / CONFIG))

    def make(self, config: ExperimentConfig) -> None:
        """Makes the run folder of `config`, whole or not at all, with what the other run had at the step.

        Raises:
            RunError: the folder is used, or `config` would have made other steps up to there.
        """
        new = Path(config.folder)
        check_goes_on(self.config, config, self.step, self.run, branch=True)
        if new.exists() and (not new.is_dir() or any(new.iterdir())):
            raise RunError(f"out={str(new)!r} is used; give a new folder, or go on in it with --resume")
        beside = new.with_name(f".{new.name[:100]}-{uuid.uuid4().hex[:8]}")
        try:
            (beside / CHECKPOINTS).mkdir(parents=True)
            mark(beside)
            shutil.copytree(self.run / CHECKPOINTS / str(self.step), beside / CHECKPOINTS / str(self.step))
            for name in _TAKEN:
                if (self.run / name).is_dir():
                    shutil.copytree(self.run / name, beside / name)
                elif (self.run / name).exists():
                    shutil.copy2(self.run / name, beside / name)
            facts = {"run": str(self.run.resolve()), "step": self.step, "other_data": has_other_data(self.config, config)}
            write_atomically(beside / BRANCH, json.dumps(facts, indent=2) + "\n")
            codec.save(dataclasses.replace(config, resume=False), beside / CONFIG)
            beside.rename(new)
        except OSError as error:
            raise RunError(f"out={str(new)!r} cannot be made ({error}); make room or give another folder") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        log.info("%s branches from %s at step %d", new, self.run, self.step)


def begins_other_data(folder: Path, step: int) -> bool:
    """Whether a run folder is a branch at `step`, to which other data was given."""
    if not (folder / BRANCH).exists():
        return False
    facts = read_json(folder / BRANCH)
    return isinstance(facts, dict) and facts.get("other_data") is True and facts.get("step") == step
