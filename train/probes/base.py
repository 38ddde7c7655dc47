"""The probe contract: what a probe measures of a layer, and what each of its statistics is."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.components import Component, Registry
from plait.configs.probe import ProbeConfig
from plait.models.look import Look


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistic:
    """One number a layer or a head has at a probe step, declared where it is measured."""

    name: str
    per: Literal["layer", "head"]
    unit: str
    meaning: str
    """Its line in the docs and in the report."""
    size: Callable[[ProbeConfig], int] | None = None
    """Length of a trailing axis."""
    metric: tuple[str, Callable[[np.ndarray], Any]] | None = None
    """The name under which metrics hold it, and how all layers and heads become one number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(Component, abc.ABC):
    """Measures looks at layers. Registered classes have no fields; what they need of the run is in `ProbeConfig`."""

    statistics: ClassVar[tuple[Statistic, ...]]

    @abc.abstractmethod
    def measure(self, look: Look, config: ProbeConfig) -> Mapping[str, jax.Array | None]:
        """The statistics of a look, float32: `[H, ...]` for a head each, `[...]` for the layer; None or left out where there is none."""


PROBES: Registry[Probe] = Registry("probe", "plait.train.probes")
register = PROBES.register


class Probes:
    """The observer of a run: all its probes on the part of a batch that `ProbeConfig` names."""

    def __init__(self, config: ProbeConfig):
        self.config = config
        self.probes: Sequence[Probe] = tuple(probe() for probe in PROBES.all().values())

    def pick_sequences(self, batch_size: int) -> slice:
        """An even stride over the batch, so that every data shard contributes."""
        count = min(self.config.sequences, batch_size)
        return slice(0, count * (batch_size // count), batch_size // count)

    def pick_rows(self, length: int) -> jax.Array:
        """Evenly spaced query positions `[R]` int32, the last one included."""
        count = min(self.config.rows, length)
        return jnp.asarray([(i + 1) * length // count - 1 for i in range(count)], jnp.int32)

    def measure(self, looks: tuple[Look, ...]) -> dict[str, jax.Array]:
        """Those of all probes; heads of several looks one after another, NaN where one of them has no such value."""
        found: dict[str, jax.Array] = {}
        for probe in self.probes:
            parts = [{k: v for k, v in probe.measure(look, self.config).items() if v is not None} for look in looks]
            for statistic in probe.statistics:
                values = [part.get(statistic.name) for part in parts]
                present = [value for value in values if value is not None]
                if statistic.per == "layer" and present:
                    found[statistic.name] = present[0]
                elif present:
                    heads = [0 if look.mixer is None else look.mixer.num_heads for look in looks]
                    blank = [jnp.full((n, *present[0].shape[1:]), jnp.nan) for n in heads]
                    found[statistic.name] = jnp.concatenate([b if v is None else v for v, b in zip(values, blank, strict=True)])
        return found
