"""Reading a `config.json`: each value once, and none passed over that says something."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from plait.models.hf.base import Unfit

SAYS_NOTHING = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "dtype",
        "embedding_dropout",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_length",
        "max_position_embeddings",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "residual_dropout",
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "vocab_file",
    }
)
"""Of files, generation and training, not of the function that the model is."""
_MISSING = object()


class Values:
    """The fields of a config, each of which is asked for by the family that reads it."""

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json"):
        """Args: `where` they are, for messages."""
        self._fields, self._where = fields, where
        self._asked = set(SAYS_NOTHING)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __call__(self, name: str, kind: Any, default: Any = _MISSING) -> Any:
        """The field `name`, which must be of `kind` (a class, or several); `default` where it is missing or null.

        Raises:
            Unfit: it is missing and has no default, or is of another kind.
        """
        self._asked.add(name)
        value = self._fields.get(name)
        if value is None:
            if default is _MISSING:
                raise Unfit(f"{self._where}: {name} is missing; add it, as the file of a published model has it")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(one.__name__ for one in kinds)
            raise Unfit(f"{self._where}: {name}={value!r} must be {names}; restore the file")
        return value

    def or_null(self, name: str, kind: Any, default: Any) -> Any:
        """The field `name`; None where it is null, `default` where it is missing. Raises Unfit where it is of another kind."""
        self._asked.add(name)
        return self(name, kind, None if name in self._fields else default)

    def factor(self, name: str) -> float | None:
        """The factor `name`; None where it is 1 or missing."""
        value = self(name, float, 1.0)
        return None if value == 1 else value

    def only(self, name: str, *allowed: Any) -> None:
        """Raises Unfit unless the field is missing, null or one of `allowed`: the rest there is not here."""
        self._asked.add(name)
        value = self._fields.get(name)
        if value is not None and value not in allowed:
            rest = " or ".join(map(repr, allowed)) or "null"
            raise Unfit(f"{self._where}: {name}={value!r} is not supported; {rest} can be used")

    def passed_over(self, names: Iterable[str]) -> None:
        """Fields that say nothing of the function in this family."""
        self._asked.update(names)

    def finish(self) -> None:
        """Raises Unfit for a field that nobody asked for and that may say something: not None, False, 0 or empty."""
        left = {name: value for name, value in self._fields.items() if name not in self._asked and value}
        if left:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(left.items()))
            raise Unfit(
                f"{self._where} has {listed}, which this family does not know here: the model would be another; take it out if it says nothing"
            )


def written(factor: float | None) -> float:
    """A factor as configs have it: 1 where there is none."""
    return 1.0 if factor is None else factor


def quotient(product: float, factor: float) -> float:
    """What times `factor` gives `product`, to the last bit where there is such a number."""
    near = product / factor
    return next(
        (x for x in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)) if x * factor == product), near
    )
