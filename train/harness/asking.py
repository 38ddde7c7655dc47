"""A run that is asked for likelihoods and answers in texts."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from plait.configs.components import at as under
from plait.configs.domains import Length
from plait.configs.files import read_json
from plait.data.tokenizers.files import CONFIG_FILE
from plait.data.tokenizers.tokenizer import Tokenizer
from plait.train.harness.answers import Answers, Wanted
from plait.train.harness.chat import Chat, template_of
from plait.train.harness.likelihoods import Likelihood, Likelihoods
from plait.train.harness.shapes import Shapes
from plait.train.harness.texts import Texts
from plait.train.run import RunError, Trained
from plait.train.run_folder.contents import ORIGINALS
from plait.train.terminal.console import notes

_TOLD_SECONDS = 15.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskOptions:
    """How texts are read."""

    max_length: Length | None = None
    """Tokens of a text and what is scored or written after it; the first of a longer text are left out. By default those of the run's rows."""
    batch_tokens: Length | None = None
    """Tokens read at once; by default those of a step of the run."""
    document_start: bool | None = None
    """Begin each text with the start token. By default as the run was trained, or as the published tokenizer does."""
    chat: bool = False
    """Write prompts as chats, by the template that was published with the model. The names of special tokens then stand for them."""
    chat_template: Path | None = None
    """File of another template; with `chat`."""


class Asked:
    """A run that is asked.

    Raises:
        ValueError: a run without a tokenizer or that sees both sides, a length that it cannot read, a template that is none.
    """

    def __init__(self, trained: Trained, options: AskOptions):
        config = trained.program.config
        if trained.tokenizer is None:
            raise RunError(
                f"{config.folder!r} was trained on data.task={config.data.task.name}, whose tokens are no text; "
                "give a run that was trained on text"
            )
        if not config.model.causal:
            raise RunError(
                f"{config.folder!r} has model.causal=False, and sees what it is asked for; give a run of a causal model"
            )
        self.max_length = options.max_length or config.data.seq_len
        if (positions := config.model.positions) is not None:
            under("model.positions", positions.fit_length, self.max_length, "max_length")
        step = config.data.batch_size * config.data.seq_len // config.optimizer.accumulate
        shapes = Shapes.of(config, trained.program.mesh, self.max_length, options.batch_tokens or step)
        self.tokenizer, folder = trained.tokenizer, Path(config.folder)
        self.chat = None
        if options.chat:
            template = template_of(folder) if options.chat_template is None else options.chat_template.read_text("utf-8")
            self.chat = Chat(template, trained.tokenizer)
        start = options.document_start
        if start is None:
            published = (folder / ORIGINALS).is_dir()
            start = _published_start(folder / ORIGINALS, trained.tokenizer) if published else config.data.document_start
        self.texts = Texts(tokenizer=trained.tokenizer, document_start=start, special=options.chat)
        self._ends = _published_ends(folder / ORIGINALS)
        self._likelihoods, self._answers = Likelihoods(trained, shapes), Answers(trained, shapes)

    def after(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """The likelihood of each second text after its first."""
        return self._likelihoods([self.texts.pair(*pair) for pair in pairs], _progress("continuations", len(pairs)))

    def whole(self, texts: Sequence[str]) -> list[float]:
        """Nats of log-likelihood of each text, all of it."""
        windows = [list(self.texts.windows(text, self.max_length)) for text in texts]
        flat = list(itertools.chain.from_iterable(windows))
        found = iter(self._likelihoods(flat, _progress("windows of text", len(flat))))
        return [sum(one.log for one in itertools.islice(found, len(own))) for own in windows]

    def answers(self, prompts: Sequence[tuple[str, Mapping[str, Any]]], seed: int = 0) -> list[str]:
        """The answer to each prompt, by the options of its task (`Wanted`)."""
        ids, wanted = [self.texts.prompt(text) for text, _ in prompts], [Wanted.of(options) for _, options in prompts]
        return self._answers(ids, wanted, ends=self._ends, seed=seed, told=_progress("answers", len(prompts)))


def _published_start(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a published tokenizer begins a text with the start token."""
    beside = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    said = beside.get("add_bos_token")
    if isinstance(said, bool):
        return said
    return tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("a").ids[:1] == [tokenizer.bos_id]


def _published_ends(folder: Path) -> list[int]:
    """The tokens that end an answer by the files that were published with a model."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if ids is not None:
            return [one for one in (ids if isinstance(ids, list) else [ids]) if isinstance(one, int)]
    return []


def _progress(what: str, total: int) -> Callable[[int], None]:
    """Says now and then how much is done."""
    began = said = time.monotonic()

    def told(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _TOLD_SECONDS:
            said = now
            notes.print(f"{done:,} of {total:,} {what}, {now - began:.0f} s")

    return told
