"""MoA: heads with windows of their own, whose lengths follow from that of the input by rules that a search has found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from plait.configs.domains import Line, Number, SomeSpan, Span, Whole
from plait.configs.files import parse_json
from plait.kernels import HeadMasks, Mask
from plait.models.layers.cache import Slots
from plait.models.mixers.base import Direction, register
from plait.models.mixers.sparse.masked import MaskedConfig

Rules = tuple[tuple[float, ...], tuple[float, ...]]

_ALPHA, _BETA = Number(least=-(2.0**30), most=2.0**30), Number(least=0, most=1)


@register(
    "moa",
    kind="sparse",
    source="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2406.14909)",
    proof="spans and sink tokens of a published plan's form by hand in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoAConfig(MaskedConfig):
    """Softmax attention in a window of `alpha_h + beta_h N` tokens of head h, and to the document's first tokens; N is `length`.

    A plan has alphas and betas for every head of every layer: `{"alphas": [[...], ...], "betas": [[...], ...]}`, a list a layer, as the
    authors' search writes it. Layers of one name share their rules, so each layer of a plan is a mixer of its own name with its `layer`.
    The search itself (profile, integer program) is not here. Spans are in whole tokens, where the authors' kernel takes blocks of 64.
    A run keeps the rules that it read, not the file's name.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal",)

    plan: Line | None = None
    """A plan's JSON file; None takes `alphas` and `betas`."""
    layer: Annotated[int, Whole(0, 4095)] = 0
    """Of the plan."""
    alphas: tuple[Annotated[float, _ALPHA], ...] | None = None
    """Tokens of each head's span whatever the input; None for 0."""
    betas: tuple[Annotated[float, _BETA], ...] | None = None
    """Share of the input that each head's span has besides; None for 0.5, the same for all heads."""
    length: Span = 4096
    """Tokens of the input, N, for which spans are worked out."""
    num_sink_tokens: SomeSpan = 64
    """Leading tokens of each document that stay visible."""

    def check(self) -> None:
        super().check()
        given = [name for name in ("alphas", "betas") if getattr(self, name) is not None]
        if self.plan is not None and given:
            raise ValueError(f"plan={self.plan!r} has {given[0]} of its own; leave {given[0]} out, or the plan")
        if self.plan is None and self.layer:
            raise ValueError(f"layer={self.layer} is of a plan, and plan is None; name the file, or leave layer out")

    @classmethod
    def example(cls) -> MoAConfig:
        return cls(
            num_heads=4, head_dim=16, alphas=(4.0, 0.0, -8.0, 2.0), betas=(0.0, 0.25, 0.5, 0.1), length=40, num_sink_tokens=2
        )

    def settled(self, d_model: int) -> Self:
        return self.kept(d_model)

    def kept(self, d_model: int) -> Self:
        if self.plan is None:
            return self
        alphas, betas = self.rules(self.count_heads(d_model))
        return dataclasses.replace(self, plan=None, layer=0, alphas=alphas, betas=betas)

    def rules(self, num_heads: int) -> Rules:
        """Alphas and betas of the heads. Raises ValueError where they are another model's."""
        if self.plan is not None:
            return read_rules(self.plan, self.layer, num_heads)
        alphas = (0.0,) * num_heads if self.alphas is None else self.alphas
        betas = (0.5,) * num_heads if self.betas is None else self.betas
        for name, values in (("alphas", alphas), ("betas", betas)):
            if len(values) != num_heads:
                raise ValueError(f"{name}={values} must have a number for each of num_heads={num_heads} heads; give {num_heads}")
        return alphas, betas

    def spans(self, num_heads: int) -> tuple[int, ...]:
        """Tokens of each head's window, at least the query's own."""
        return tuple(max(1, int(alpha + beta * self.length)) for alpha, beta in zip(*self.rules(num_heads), strict=True))

    def mask(self, num_heads: int, causal: bool) -> HeadMasks:
        one = lambda span: Mask(causal=causal, window_size=span, num_sink_tokens=self.num_sink_tokens)
        return HeadMasks(tuple(one(span) for span in self.spans(num_heads)))

    def slots(self) -> Slots:
        if self.plan is None:
            given = self.alphas or self.betas or (0.0,)
            return Slots(max(self.spans(len(given))), self.num_sink_tokens)
        alphas, _ = _read(self.plan, self.layer)
        return Slots(max(self.spans(len(alphas))), self.num_sink_tokens)


def read_rules(plan: str, layer: int, num_heads: int) -> Rules:
    """Alphas and betas of a layer's heads. Raises ValueError where the file cannot be read or is of another model."""
    alphas, betas = _read(plan, layer)
    for name, values in (("alphas", alphas), ("betas", betas)):
        if len(values) != num_heads:
            raise ValueError(
                f"plan={plan!r} has {len(values)} {name} in layer {layer}, and num_heads={num_heads}; "
                "use a plan that was searched for this model"
            )
    return alphas, betas


def _read(plan: str, layer: int) -> Rules:
    form = 'it must be JSON as {"alphas": [[a number a head], a list a layer], "betas": [...]}'
    try:
        tree: Any = parse_json(Path(plan).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"plan={plan!r} cannot be read ({error}); {form}") from None
    found = []
    for name, domain in (("alphas", _ALPHA), ("betas", _BETA)):
        layers = tree.get(name) if isinstance(tree, dict) else None
        number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
        rows = isinstance(layers, list) and all(isinstance(row, list) and row and all(map(number, row)) for row in layers)
        if not rows or not layers:
            raise ValueError(f"plan={plan!r} has no {name!r} of layers and heads; {form}")
        if layer >= len(layers):
            raise ValueError(
                f"layer={layer} must be one of the {len(layers)} of plan={plan!r}; "
                "use a plan that was searched for this model, or a layer of it"
            )
        for value in layers[layer]:
            if value not in domain:
                raise ValueError(f"plan={plan!r} has {value} among the {name} of layer {layer}; each must be {domain.rule}")
        found.append(tuple(float(x) for x in layers[layer]))
    if len(tree["alphas"]) != len(tree["betas"]):
        raise ValueError(
            f"plan={plan!r} has alphas of {len(tree['alphas'])} layers and betas of {len(tree['betas'])}; it must have both of each layer"
        )
    return found[0], found[1]
