"""Full attention to a window, and back."""

from __future__ import annotations

import dataclasses

from plait.configs.domains import Counted, SomeSpan, Span
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.train.convert.reshapes.base import Reshape, Subject, chosen, core, is_softmax, register, with_core, with_mixers


@register("window", source="Longformer (2004.05150); sink tokens: StreamingLLM (2309.17453)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Reshape):
    """Softmax attention that sees a window, or all again. No parameter changes."""

    window_size: Span | None = 4096
    """Tokens that a query sees, itself included; None for all."""
    num_sink_tokens: SomeSpan = 0
    """Leading tokens of each document that stay visible outside the window."""
    layers: tuple[Counted, ...] | None = None
    """Numbers of the layers, with commas; all with softmax attention by default."""

    def check(self) -> None:
        if self.window_size is None and self.num_sink_tokens:
            raise ValueError(
                f"num_sink_tokens={self.num_sink_tokens} needs a window, without which all are visible; set window_size"
            )

    def model(self, subject: Subject):
        model = subject.model
        found = {}
        for index in chosen(model, self.layers, is_softmax, "softmax attention"):
            mixer = model.layer_mixers[index]
            softmax = core(mixer)
            assert isinstance(softmax, SoftmaxConfig)
            seen = {"window_size": self.window_size, "num_sink_tokens": self.num_sink_tokens}
            found[index] = with_core(mixer, dataclasses.replace(softmax, **seen))  # type: ignore[arg-type]
        return with_mixers(model, found, "full" if self.window_size is None else "window")
