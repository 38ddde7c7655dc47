"""Chats as a model was taught to read them: by the template that was published with it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from plait.configs.files import read_json
from plait.data.tokenizers.files import CONFIG_FILE
from plait.data.tokenizers.tokenizer import Tokenizer
from plait.train.convert.reading import TEMPLATE
from plait.train.run_folder.contents import ORIGINALS

Messages = Sequence[Mapping[str, str]]
"""What is said, `role` and `content` each."""


def template_of(run: Path) -> str:
    """The chat template in the published files of a run. Raises ValueError where there is none."""
    file = run / ORIGINALS / TEMPLATE
    if file.is_file():
        return file.read_text("utf-8")
    beside = run / ORIGINALS / CONFIG_FILE
    found = read_json(beside).get("chat_template") if beside.is_file() else None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"{str(run)!r} has no chat template in {ORIGINALS}/{TEMPLATE}; give one with --chat-template FILE, or leave --chat out"
        )
    return found


class Chat:
    """A template, which is Jinja: it runs in Jinja's sandbox, as `transformers` runs it.

    Raises:
        ValueError: the template is none.
    """

    def __init__(self, template: str, tokenizer: Tokenizer):
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.template = template
        self._errors = jinja2.exceptions.TemplateError
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation()]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._names = {"bos_token": tokenizer.token_name(tokenizer.bos_id), "eos_token": tokenizer.token_name(tokenizer.eos_id)}
        try:
            self._compiled = environment.from_string(template)
        except self._errors as error:
            raise ValueError(
                f"chat_template is no Jinja template ({error}); give the one that was published with the model"
            ) from None

    def __call__(self, messages: Messages, goes_on: bool = True) -> str:
        """The text of a chat, up to where the assistant answers, or without `goes_on` within its last message.

        A template that takes no system message is given the others.

        Raises:
            ValueError: the template refuses the messages.
        """
        try:
            text = self._render(messages, goes_on)
        except self._errors as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise ValueError(
                    f"chat_template refuses the messages ({error}); give another with --chat-template FILE"
                ) from None
            return self(others, goes_on)
        if goes_on:
            return text
        last = messages[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _render(self, messages: Messages, goes_on: bool) -> str:
        given: dict[str, Any] = {**self._names, "messages": [dict(one) for one in messages], "tools": None, "documents": None}
        return self._compiled.render(**given, add_generation_prompt=goes_on)

    def _refuse(self, message: str) -> NoReturn:
        raise self._errors(message)


def _generation() -> Any:
    """`{% generation %}`, which marks for training what the assistant says, and here is passed over."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags: set[str] = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance's)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
