"""A run as a model of lm-evaluation-harness, and its tasks on it. Needs the extra `eval`."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from plait.train.harness.asking import Asked

VERSION: str = lm_eval.__version__
_DRAWS = 1000
"""Resamples behind a standard error that has no formula."""
_ONE_PROCESS = "DISABLE_MULTIPROC"
"""Where it is set, the harness resamples in this process; others, forked beside JAX's threads, may never end."""


class AskedLM(LM):
    """See the module."""

    def __init__(self, asked: Asked, seed: int = 0):
        super().__init__()
        self.asked, self._seed = asked, seed
        self.max_length = asked.max_length

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(one.log, one.greedy) for one in self.asked.after([request.args for request in requests])]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self.asked.whole([request.args[0] for request in requests])

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self.asked.answers([request.args for request in requests], self._seed)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert self.asked.chat is not None
        return self.asked.chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None if self.asked.chat is None else self.asked.chat.template

    @property
    def tokenizer_name(self) -> str:
        return self.asked.tokenizer.fingerprint


class Tasks:
    """Tasks, groups and tags of the harness by name, read once.

    Raises:
        ValueError: a name that is not there, or a task that cannot be loaded.
    """

    def __init__(self, names: Sequence[str], folder: Path | None):
        if not logging.getLogger("plait").isEnabledFor(logging.DEBUG):
            logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells every default that a task's file leaves
        own = None if folder is None else _manager(folder, False)
        self._manager = own if own is not None and all(own.match_tasks([name]) for name in names) else _manager(folder, True)
        for name in names:
            if not self._manager.match_tasks([name]):
                near = _near(name, self._manager.all_tasks if own is None else own.all_tasks)
                where = "; give the folder of its file with --include-path" if folder is None else f" nor in {str(folder)!r}"
                raise ValueError(f"--lm-eval {name!r} is no task of lm-eval {VERSION}{where}{near}")
        self._names = list(names)
        try:
            self._loaded = self._manager.load(self._names)
        except Exception as error:  # whatever a task's file, its functions and the readers of its data raise
            raise ValueError(
                f"--lm-eval {','.join(names)} cannot be loaded: {type(error).__name__}: {error}; see the task's file, and where its data is"
            ) from error
        self._manager.load = lambda _: self._loaded

    def score(self, lm: AskedLM, **options: Any) -> Mapping[str, Any]:
        """What `simple_evaluate` finds."""
        chats = lm.asked.chat is not None
        options |= {"apply_chat_template": chats, "fewshot_as_multiturn": chats, "bootstrap_iters": _DRAWS}
        before = os.environ.get(_ONE_PROCESS)
        os.environ[_ONE_PROCESS] = "1"
        try:
            found = simple_evaluate(lm, tasks=self._names, task_manager=self._manager, **options)
        finally:
            if before is None:
                del os.environ[_ONE_PROCESS]
        assert found is not None
        return found


def _manager(folder: Path | None, defaults: bool) -> Any:
    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
