"""What a family of published models is: a class in one file, found by the model type that its `config.json` names."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from plait.configs.components import Component, Registry
from plait.models.config import LMConfig
from plait.models.hf.places import Place, layer_places
from plait.models.hf.transforms import Fused, Same, Transform, Transposed

if TYPE_CHECKING:
    from plait.models.hf.values import Values


class Unfit(ValueError):
    """A model that a family cannot hold, or a config of the family that the model here cannot be; the message says why."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a family's table: tensors, what makes them arrays, and where these lie."""

    tensors: tuple[str, ...]
    places: tuple[Place, ...]
    transform: Transform
    float32: bool = False
    """Whether the tensors are float32 in files of any dtype."""


class Layer:
    """The lines of one layer, by names relative to it on both sides."""

    def __init__(self, place: Place, prefix: str):
        """Args: `prefix` is of the tensors, with its dot."""
        self.place, self.prefix = place, prefix

    def line(
        self, tensors: str | tuple[str, ...], paths: str | tuple[str, ...], transform: Transform, *, float32: bool = False
    ) -> Line:
        """One of any transform."""
        names, ours = (value if isinstance(value, tuple) else (value,) for value in (tensors, paths))
        return Line(
            tuple(self.prefix + name for name in names),
            tuple(Place(f"{self.place.path}.{path}", self.place.index) for path in ours),
            transform,
            float32,
        )

    def dense(self, name: str, path: str, *, bias: bool = False, transposed: bool = True) -> Iterator[Line]:
        """Those of a linear map; `transposed` says whether its weight is `[out, in]`."""
        yield self.line(f"{name}.weight", f"{path}.kernel", Transposed() if transposed else Same())
        if bias:
            yield self.line(f"{name}.bias", f"{path}.bias", Same())

    def fused(self, name: str, paths: tuple[str, ...], transform: Fused, *, bias: bool = False) -> Iterator[Line]:
        """Those of a linear map that is several here."""
        yield self.line(f"{name}.weight", tuple(f"{path}.kernel" for path in paths), transform)
        if bias:
            yield self.line(f"{name}.bias", tuple(f"{path}.bias" for path in paths), transform)

    def entry(self, name: str, path: str, index: int, transform: Transform) -> Line:
        """Of a tensor that is one entry along the first axis of an array."""
        place = Place(f"{self.place.path}.{path}", (*self.place.index, index))
        return Line((self.prefix + name,), (place,), transform)

    def expert(self, name: str, path: str, index: int) -> Line:
        """That of the linear map of one expert, of which there is a stack here."""
        return self.entry(f"{name}.weight", f"{path}.kernel", index, Transposed())

    def norm(self, name: str, path: str) -> Iterator[Line]:
        """Those of a norm with a bias."""
        yield self.same(f"{name}.weight", f"{path}.scale")
        yield self.same(f"{name}.bias", f"{path}.bias")

    def same(self, name: str, path: str, *, float32: bool = False) -> Line:
        """Of a tensor that is the array."""
        return self.line(name, path, Same(), float32=float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Component, abc.ABC):
    """A family of models; the registered name is the `model_type` of its configs."""

    architecture: ClassVar[str]
    """The class of `transformers` that its causal language models name."""
    mixers: ClassVar[tuple[str, ...]] = ("softmax",)
    """Those that its layers can have."""
    base: ClassVar[str] = "model."
    """Before the names of all tensors but the head's; files that were saved without the head lack it."""
    head: ClassVar[str] = "lm_head.weight"
    """The head's tensor."""
    layers_name: ClassVar[str] = "layers"
    """Under which the layers are."""
    around: ClassVar[Mapping[str, str]] = {"embed_tokens.weight": "embedding", "norm.weight": "norm.scale"}
    """Tensors outside the layers, without the base, and the parameters that they are."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Parts of names that other files have in place of those in the table."""
    behind: ClassVar[str | None] = None
    """Field of a config that counts layers behind the last one, which predict tokens further ahead and are left out."""
    stale: ClassVar[tuple[str, ...]] = ()
    """Older fields of configs, in place of which `values` writes newer ones."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Patterns (`*` for any layer) of tensors that older files hold and that follow from the config."""

    @abc.abstractmethod
    def model(self, values: Values) -> LMConfig:
        """The model that a config describes. Raises Unfit where it asks for what there is not here."""

    @abc.abstractmethod
    def values(self, model: LMConfig) -> dict[str, Any]:
        """The config that describes a model, but for `architectures` and `model_type`. Raises Unfit where the family has no such models."""

    @abc.abstractmethod
    def layer(self, model: LMConfig, index: int, layer: Layer) -> Iterator[Line]:
        """The lines of a layer."""

    def outside(self, model: LMConfig) -> Iterator[Line]:
        """The lines of embedding, final norm and head."""
        for name, path in self.around.items():
            yield Line((self.base + name,), (Place(path),), Same())
        if not model.tie_embeddings:
            yield Line((self.head,), (Place("head.kernel"),), Transposed())

    def unread(self, model: LMConfig) -> tuple[str, ...]:
        """Patterns of tensors that files of a model may hold beside those of the table, and that say nothing."""
        return self.ignored

    @property
    def embedding(self) -> str:
        """The embedding's tensor."""
        return self.base + next(name for name, path in self.around.items() if path == "embedding")

    def table_for(self, model: LMConfig, names: Container[str]) -> list[Line]:
        """That of a folder that has tensors of these names, where there are several forms; `table` is what is written."""
        return self.table(model)

    def table(self, model: LMConfig) -> list[Line]:
        """All lines, those of one array together."""
        lines = list(self.outside(model))
        for index, place in enumerate(layer_places(model)):
            lines += self.layer(model, index, Layer(place, f"{self.base}{self.layers_name}.{index}."))
        order: dict[str, int] = {}
        for line in lines:
            order.setdefault(line.places[0].path, len(order))
        return sorted(lines, key=lambda line: order[line.places[0].path])


MODEL_TYPES: Registry[Family] = Registry("model type", "plait.models.hf", Family)
register = MODEL_TYPES.register
