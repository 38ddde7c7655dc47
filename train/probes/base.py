"""The probe contract, and the observer that runs the probes of a run."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.components import Component, ConfigError, Registry
from plait.configs.probe import ProbeConfig
from plait.kernels import Tokens
from plait.models.looks.look import Look
from plait.models.looks.taps import Place, Sums, Taps
from plait.train.probes.statistic import Statistic
from plait.train.probes.thresholds import ThresholdWatcher
from plait.train.watching.watchers import Watcher

if TYPE_CHECKING:
    from plait.train.report.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(Component, abc.ABC):
    """Measures looks at layers. Registered classes have no fields; what they need of the run is in `ProbeConfig`."""

    statistics: ClassVar[tuple[Statistic, ...]]
    by_default: ClassVar[bool] = True
    """Whether it runs where no probes are named: those that cost more, or that few runs need, are asked for."""
    title: ClassVar[str | None] = None
    """As the report calls it, where its name in words is not what it is called."""

    @classmethod
    def topic(cls) -> str:
        """As the report calls it."""
        return cls.title or cls.name.replace("_", " ").capitalize()

    @abc.abstractmethod
    def measure(self, look: Look, config: ProbeConfig) -> Mapping[str, jax.Array | None]:
        """The statistics of a look: `[H, ...]` for a head each, `[...]` for the layer; None or left out where there is none."""

    def parts(self, looks: tuple[Look, ...], config: ProbeConfig) -> Mapping[str, jax.Array]:
        """What `across` needs of a layer; it is not recorded."""
        return {}

    def across(self, layers: Sequence[Mapping[str, jax.Array]], config: ProbeConfig) -> Sequence[Mapping[str, jax.Array]]:
        """Statistics that take all layers, a mapping each, of the parts of each."""
        return ()

    def by_source(self, layers: Sequence[Mapping[str, jax.Array]], of: jax.Array) -> Sequence[Mapping[str, jax.Array]]:
        """Statistics that tell the sources of a mixture apart, a mapping each, of the parts of each: see `plait.train.probes.sources`."""
        return ()

    def watchers(self, layers: Sequence[Mapping[str, Any]]) -> list[Watcher]:
        """What finds its events; more than one threshold says is a watcher of its own. `layers` as in `probes/layers.json`."""
        return [ThresholdWatcher(statistic, layers) for statistic in self.statistics if statistic.event is not None]

    def summary(self, run: Run) -> str | None:
        """A sentence of the report on a run: here how the first statistic went in each kind of heads."""
        statistic = self.statistics[0]
        panel = statistic.panel
        if panel is None:
            return None
        of_heads, word = (np.nanmax, "largest") if panel.most else (np.nanmedian, "median")
        went = [
            f"{of_heads(part[0]):.3g} to {of_heads(part[-1]):.3g}{group.words and f' in {group.words}'}"
            for group, part in run.by_group(statistic.name).items()
            if np.isfinite(part[0]).any() and np.isfinite(part[-1]).any()
        ]
        return f"{panel.title} went from {', '.join(went)} ({word}, {statistic.unit})." if went else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientProbe(Probe):
    """Measures gradients of the loss as they pass layers in the backward pass of the probe step itself, of all its rows and micro-batches.
    What it reads adds up over micro-batches; its statistics are made of the sums once a step."""

    place: ClassVar[Place]
    """Whose gradients: see `plait.models.looks.taps`."""
    width: ClassVar[int]
    """How many sums of a layer, or of each head."""

    def measure(self, look: Look, config: ProbeConfig) -> Mapping[str, jax.Array | None]:
        return {}

    @abc.abstractmethod
    def read(self, gradient: jax.Array, x: jax.Array | None, at: Tokens) -> jax.Array:
        """`[width]` of a layer or `[H, width]` of heads, float32, of a micro-batch; `x` is that whose gradient it is, of heads."""

    @abc.abstractmethod
    def conclude(self, sums: jax.Array) -> Mapping[str, jax.Array]:
        """The statistics of a layer; where all sums are 0 nothing was told, and they are NaN."""


PROBES: Registry[Probe] = Registry("probe", "plait.train.probes", Probe)
register = PROBES.register


EVERY, DEFAULT = "all", "default"


def chosen(only: str = EVERY) -> tuple[Probe, ...]:
    """The probes of these names, separated by commas, among them `default` and `all`. Raises ValueError, naming the nearest, where one
    does not exist."""
    every = PROBES.all()
    sets = {EVERY: list(every), DEFAULT: [name for name, probe in every.items() if probe.by_default]}
    try:
        names = [one for name in only.split(",") for one in sets.get(name.strip(), [name.strip()])]
        return tuple(PROBES[name]() for name in dict.fromkeys(names))
    except ValueError as error:
        raise ConfigError(f"probe.only={only!r}: {error}") from None


def statistics(probes: Sequence[Probe] | None = None) -> dict[str, Statistic]:
    """All that probes (None: every one there is) declare, by name."""
    return {one.name: one for probe in (chosen() if probes is None else probes) for one in probe.statistics}


class Probes:
    """The observer of a run: its probes on the part of a batch that `ProbeConfig` names."""

    whole = False

    def __init__(self, config: ProbeConfig):
        """Raises ValueError where `only` names a probe that does not exist."""
        self.config = config
        self.probes = chosen(DEFAULT if config.only is None else config.only)

    def pick_sequences(self, batch_size: int) -> slice:
        """An even stride over the batch, so that every data shard contributes."""
        count = min(self.config.sequences, batch_size)
        return slice(0, count * (batch_size // count), batch_size // count)

    def pick_rows(self, length: int) -> jax.Array:
        """Evenly spaced query positions `[R]` int32, the last one included."""
        count = min(self.config.rows, length)
        return jnp.asarray([(i + 1) * length // count - 1 for i in range(count)], jnp.int32)

    def measure(self, looks: tuple[Look, ...]) -> dict[str, jax.Array]:
        """Those of all probes, float32; heads of several looks one after another, NaN where one of them has no such value. What probes
        need to go on `across` layers is among them, under `PROBE/NAME`.

        Raises:
            ValueError: a probe measured what it does not declare.
        """
        found: dict[str, jax.Array] = {}
        heads = [0 if look.mixer is None else look.mixer.num_heads for look in looks]
        for probe in self.probes:
            parts = [probe.measure(look, self.config) for look in looks]
            self._check(probe, parts, heads)
            for statistic in probe.statistics:
                values = [part.get(statistic.name) for part in parts]
                present = [value for value in values if value is not None]
                if not present:
                    continue
                if statistic.per == "head":
                    blank = [jnp.full(statistic.shape(count, self.config), jnp.nan) for count in heads]
                    present = [jnp.concatenate([b if v is None else v for v, b in zip(values, blank, strict=True)])]
                found[statistic.name] = present[0].astype(jnp.float32)
            found |= {f"{probe.name}/{name}": value for name, value in probe.parts(looks, self.config).items()}
        return found

    def across(self, layers: Sequence[Mapping[str, jax.Array]], of: jax.Array | None = None) -> list[dict[str, jax.Array]]:
        """The statistics of each layer of a step, from what `measure` gave of them: with those that take all layers, and of a mixture those
        that take sources; `of` says which each looked-at sequence is of, bool `[B, S]`."""
        found = [{name: value for name, value in layer.items() if "/" not in name} for layer in layers]
        for probe in self.probes:
            own = f"{probe.name}/"
            parts = [{name.removeprefix(own): value for name, value in layer.items() if name.startswith(own)} for layer in layers]
            if any(parts):
                several = probe.across(parts, self.config)
                self._check(probe, several, [0] * len(several))
                of_sources = () if of is None else probe.by_source(parts, of)
                self._check(
                    probe, of_sources, [next(map(len, one.values()), 0) for one in of_sources], 0 if of is None else of.shape[1]
                )
                for more in (several, of_sources):
                    found = [one | dict(own) for one, own in zip(found, more or [{}] * len(found), strict=True)]
        return found

    def taps(self, heads: Sequence[int]) -> Taps:
        """See `plait.models.looks.taps.GradientObserver`."""

        def zeros(place: Place, *leading: int) -> dict[str, jax.Array]:
            return {probe.name: jnp.zeros((*leading, probe.width)) for probe in self._watching(place)}

        return [{"heads": zeros("heads", count), "residual": zeros("residual")} for count in heads]

    def read(self, place: Place, gradient: jax.Array, x: jax.Array | None, at: Tokens) -> Sums:
        """What probes of gradients read, by probe."""
        return {probe.name: probe.read(gradient, x, at) for probe in self._watching(place)}

    def conclude(self, told: Taps) -> list[dict[str, jax.Array]]:
        """Their statistics, of each layer."""
        found: list[dict[str, jax.Array]] = [{} for _ in told]
        for layer, own in zip(found, told, strict=True):
            for place, sums in own.items():
                for probe in self._watching(place):
                    layer.update(probe.conclude(sums[probe.name]))
        return found

    def _watching(self, place: Place) -> list[GradientProbe]:
        return [probe for probe in self.probes if isinstance(probe, GradientProbe) and probe.place == place]

    def _check(
        self, probe: Probe, parts: Sequence[Mapping[str, jax.Array | None]], heads: Sequence[int], sources: int = 0
    ) -> None:
        declared = {statistic.name: statistic for statistic in probe.statistics}
        for part, count in zip(parts, heads, strict=True):
            for name, value in part.items():
                if name not in declared:
                    raise ValueError(
                        f"probe {probe.name!r} measured {name!r}; declare it, it has the statistics {list(declared)}"
                    )
                if value is not None and value.shape != (shape := declared[name].shape(count, self.config, sources)):
                    raise ValueError(f"probe {probe.name!r}: {name}.shape={value.shape} must be {shape}, as it is declared")
