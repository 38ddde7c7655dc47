"""Every leaf of a config does something.

Each leaf is changed to another valid value, and some sign of the run must change: the shapes of the parameters, the program
that is traced (its text and constants), the layout on devices, or the rows that are read. A new field needs no entry here unless
it works only beside another value (`NEEDS`), takes a text (`TEXTS`), or steers the loop (`LOOP`, shown in train/test_loop.py).
A field that changes nothing fails.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import pytest

from plait.configs.components import Component, children, registry_of
from plait.configs.experiment import ExperimentConfig
from plait.configs.listing import registry
from plait.configs.mesh import MeshConfig
from plait.data.mixture.config import SourceConfig
from plait.data.tasks.generated import GeneratedTask
from plait.data.tasks.mlm import MaskedLanguageTask
from plait.models.attention_losses import AttentionLossConfig
from plait.models.config import pattern_name
from plait.models.layers.lora import LoRAConfig
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.sparse.blockrank import BlockRankConfig
from plait.models.qk_clip import QKClipConfig
from plait.tests.configs.signs import (
    SEQ_LEN,
    data_signs,
    folder_signs,
    mesh_signs,
    mixer_signs,
    model_signs,
    notices,
    seen_alone,
    step_signs,
)
from plait.tests.train.common import changed, get_leaf, tiny, write_corpus

LOOP = {
    "init_from",
    "out",
    "resume",
    "log_every",
    "probe_every",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "wandb",
    "optimizer.max_bad_steps",
    "spike.sigma",
    "spike.window",
    "spike.action",
    "spike.max_rewinds",
    "data.cache_dir",
}
"""Leaves that steer the loop; tests/train/test_loop.py has a case for each, and fails where one is missing."""

TEXTS = {
    "name": ["another"],
    "model.pattern": ["gla@1;softmax"],
    "data.source": ["{other}"],
    "data.text_field": ["body"],
    "data.prompt_field": ["body"],
    "model.lora.targets": ["head"],
    "data.tokenizer": ["bpe"],
    "probe.only": ["entropy"],
}
"""Other values of the leaves that are free text."""

RANKING: dict[str, Any] = {"model.pattern": "blockrank", "model.mixers": {"blockrank": BlockRankConfig.example()}}

NEEDS: dict[str, dict[str, Any]] = {
    "mega.max_distance": {"bias": "simple"},
    "needles.num_values": {"num_keys": 1},
    "variable_tracking.num_chains": {"num_hops": 2},
    "optimizer.decay_fraction": {"optimizer.schedule": "wsd"},
    "mesh.context_exchange": {"mesh": MeshConfig(fsdp=4, context=2)},
    "data.text_field": {"data.source": "{lines}"},
    "data.split_seed": {"data.source": "{lines}"},
    "data.temperature": {
        "data.source": "{lines}",
        "data.sources": {"a": SourceConfig(weight=9.0), "b": SourceConfig(weight=1.0, text_field="body")},
    },
    "data.prompt_field": {"data.source": "{lines}"},
    "model.lora.rank": {"init_from": "runs/base"},
    **{
        f"model.lora.{field}": {"init_from": "runs/base", "model.lora": LoRAConfig(rank=2)}
        for field in ("alpha", "scaling", "targets")
    },
    "probe.far": {"probe.only": "distance"},
    **{f"probe.{field}": {"probe.only": "waad_fai", "data.seq_len": 64} for field in ("waad_window", "fai_from", "fai_to")},
    "model.qk_clip.alpha": {"model.qk_clip": QKClipConfig(threshold=1.0)},
    "model.attention_loss.floor": {"model.attention_loss": AttentionLossConfig(entropy_floor=1.0)},
    "model.attention_loss.document_ranking": RANKING,
    "model.attention_loss.temperature": {**RANKING, "model.attention_loss": AttentionLossConfig(document_ranking=1.0)},
    "model.causal": {"data.task": MaskedLanguageTask()},
    "data.vocab_size": {"data.tokenizer": "bpe", "data.vocab_size": 300},
    "mamba1.norm_scale": {"norm_eps": 1e-6},
    "moe.swiglu_alpha": {"swiglu_limit": 7.0},
    "moe.norm_eps": {"own_norms": True},
    "model.layer_inputs.activation": {"model.layer_inputs.dim": 4},
    "moa.num_heads": {"alphas": None, "betas": None},
    "moe.top_k_groups": {"num_experts": 8, "num_groups": 4, "top_k_groups": 2},
    "moe.group_score_top_k": {"num_experts": 8, "num_groups": 2},
    "mega_chunk.max_distance": {"bias": "simple"},
    "moh.experts": {"num_shared_heads": 1},
    "moh.router": {"num_shared_heads": 1},
    "mta.norm": {"depth_scale": False},
    "parallel.shared_output": {"parts": (SoftmaxConfig.example(), GLAConfig.example()), "norm": "heads"},
    "lolcats.qk_norm_over": {"qk_norm": True},
    "lolcats.qk_norm_eps": {"qk_norm": True},
    "power.qk_norm_over": {"qk_norm": True},
    "power.qk_norm_eps": {"qk_norm": True},
    "softmax.qk_norm_over": {"qk_norm": True},
    "softmax.qk_norm_eps": {"qk_norm": True},
    "linear.norm_eps": {"normalizer": "rms_norm"},
    "optimised.head_dim": {"num_heads": None},
    "titans_mac.head_dim": {"num_heads": None},
    "softmax.num_kv_heads": {"num_heads": 4},
    "softmax.num_sink_tokens": {"window_size": 4},
    "softmax.window_size": {"window_size": 8},
}
"""What must hold for a leaf to work; of a component's leaf by `name.field`, within the component."""

FOLLOWS = {
    "blockrank.answer_id": "model.attention_loss.document_ranking",
    "blockrank.num_documents": "model.attention_loss.document_ranking",
    "moa.plan": "a file",
    "moa.layer": "a file",
    "optimised.num_heads": "head_dim",
    "titans_mac.num_heads": "head_dim",
}
"""Leaves that have one valid value beside another, or work beside what is no field of the component, as its own tests show."""

BEFORE: dict[str, dict[str, Any]] = {
    "softmax.shared_kv": {"shared_kv": "write"},
    "power.shared_kv": {"shared_kv": "write"},
}
"""Options of a layer of the same mixer that must come before, by `mixer.field`."""


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted path, annotated type)` of every leaf below a config dataclass; mixers and their like are walked on their own."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(value) and not isinstance(value, MixerConfig):
            yield from leaves(value, name)
        elif not isinstance(value, Mapping | MixerConfig):
            yield name, hints[field.name]


def candidates(kind: Any, value: Any) -> list[Any]:
    """Other values of a type, likely valid ones first."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return [c for option in options for c in candidates(option, value)] + [None]
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        doubled = [tuple(2 * one for one in value)] if value else []
        return [(0.5, 2.0), (0.5, 2.0, 1.0, 1.0, 1.0), *doubled]
    if isinstance(kind, type) and issubclass(kind, Component):
        return [config() for config in getattr(registry_of(kind), "all", dict)().values()]
    if kind is bool:
        return [not value]
    if kind is int:
        return [2, 1, 4, 8, 256] if value is None else [value * 2, value // 2, value + 1, value + 2, value - 1]
    if kind is float:
        return [0.5, 4.0, -1.0] if value is None else [value * 2, value / 2, value * 0.9, 0.5]
    return []


BASE = tiny(
    {
        "model.mixers.softmax.head_dim": 8,
        "data.seq_len": SEQ_LEN,
        "steps": 40,
        "optimizer.warmup_steps": 10,
    }
)
SIGNS = {"model": mixer_signs, "optimizer": step_signs, "probe": step_signs, "mesh": mesh_signs}
TOP_SIGNS = {"name": folder_signs, "seed": model_signs, "steps": step_signs}
PATHS = dict(leaves(BASE))


def signs_of(path: str, folder: Any) -> Callable[[ExperimentConfig], Iterator]:
    head, _, rest = path.partition(".")
    if head == "data":
        return functools.partial(data_signs, folder=folder)
    return (SIGNS if rest else TOP_SIGNS).get(head, step_signs)


def valid_changes(base: Any, path: str, kind: Any, values: list[Any]) -> Iterator[Any]:
    """`base` with the leaf at `path` set to each of the values that it accepts."""
    for value in values:
        if value == get_leaf(base, path):
            continue
        try:
            yield changed(base, {path: value})
        except ValueError:
            continue


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, str]:
    """Two folders of documents, and lines with two fields."""
    folder = tmp_path_factory.mktemp("corpora")
    records = [{"text": "one two three " * 40 + str(i), "body": "four five six " * 40 + str(i)} for i in range(20)]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {
        "text": str(write_corpus(folder / "text")),
        "other": str(write_corpus(folder / "other", seed=9)),
        "lines": str(folder / "lines.jsonl"),
    }


def filled(values: Mapping[str, Any], corpora: Mapping[str, str]) -> dict[str, Any]:
    return {k: v.format(**corpora) if isinstance(v, str) else v for k, v in values.items()}


@pytest.mark.parametrize("path", [path for path in PATHS if path not in LOOP])
def test_leaf_is_noticed(path, corpora, tmp_path):
    settings = {
        "data.source": corpora["text"],
        "mesh": MeshConfig(data=2 if path == "mesh.data" else None, fsdp=2, tensor=2)
        if path.startswith("mesh")
        else MeshConfig(data=1),
    }
    settings |= {"probe_every": 1} if path.startswith("probe") else {}
    base = changed(BASE, settings | filled(NEEDS.get(path, {}), corpora))
    values = [v.format(**corpora) for v in TEXTS[path]] if path in TEXTS else candidates(PATHS[path], get_leaf(base, path))
    if path.startswith("mesh"):
        values = [1, *values]
    signs = signs_of(path, tmp_path)
    tried = 0
    for other in valid_changes(base, path, PATHS[path], values):
        try:
            found = notices(signs, base, other)
        except ValueError:  # does not fit the vocabulary or the devices
            continue
        tried += 1
        if found:
            return
    pytest.fail(
        f"{path} was changed from {get_leaf(base, path)!r} to {tried} other valid values and nothing noticed. Use it, take "
        "it away, or, where it works only beside another value or in the loop, name that in NEEDS, TEXTS or LOOP"
    )


def test_signs_do_not_change_by_themselves(corpora, tmp_path):
    base = changed(BASE, {"data.source": corpora["text"]})
    for signs in (model_signs, step_signs, mesh_signs, functools.partial(data_signs, folder=tmp_path)):
        assert not notices(signs, base, changed(base, {}))


def test_loop_leaves_exist():
    assert set(PATHS) >= LOOP, "LOOP names a field that is gone"


def with_mixer(mixer: MixerConfig, before: MixerConfig | None = None) -> ExperimentConfig:
    """A model of one such layer, of width 64, or of another `before` it."""
    mixers = (
        {pattern_name(mixer): mixer} if before is None else {f"{pattern_name(before)}/before": before, pattern_name(mixer): mixer}
    )
    causal = "causal" in mixer.directions
    data = BASE.data if causal else dataclasses.replace(BASE.data, task=MaskedLanguageTask())
    model = dataclasses.replace(
        BASE.model, d_model=64, num_layers=len(mixers), pattern=",".join(mixers), mixers=mixers, causal=causal
    )
    return dataclasses.replace(BASE, model=model, data=data)


PLACES: dict[str, Callable[[Any], ExperimentConfig]] = {
    "mixer": with_mixer,
    "position": lambda config: with_mixer(dataclasses.replace(SoftmaxConfig.example(), positions=config)),
    "channel mixer": lambda config: changed(BASE, {"model.d_model": 64, "model.channel_mixer": config}),
    "optimizer": lambda config: changed(BASE, {"optimizer": dataclasses.replace(config, warmup_steps=10)}),
    "task": lambda config: changed(BASE, {"data.task": config, "data.seq_len": 512}),
}
"""An experiment with a component in it, by kind."""


def component_leaves() -> list[Any]:
    """`(kind, component, field, type)` of every leaf of every registered component but those in `PATHS`."""
    found = []
    for kind in PLACES:
        for name, schema in registry(kind).all().items():
            config, hints = example(schema), typing.get_type_hints(schema)
            holds = {path.partition(".")[0] for path, _ in children(config)}
            fields = [
                field.name
                for field in dataclasses.fields(schema)
                if field.name not in holds and f"{name}.{field.name}" not in FOLLOWS
            ]
            if kind == "optimizer":
                fields = [field for field in fields if f"optimizer.{field}" not in PATHS]
            elif kind == "channel mixer" and isinstance(BASE.model.channel_mixer, schema):
                fields = []
            found += [pytest.param(kind, name, field, hints[field], id=f"{name}.{field}") for field in fields]
    return found


def example(schema: Any) -> Any:
    return schema.example() if hasattr(schema, "example") else schema()


@pytest.mark.parametrize(("kind", "name", "field", "hint"), component_leaves())
def test_leaf_of_a_component_is_noticed(kind, name, field, hint, tmp_path):
    few = {"val_rows": 16} if issubclass(registry(kind)[name], GeneratedTask) else {}
    config = dataclasses.replace(example(registry(kind)[name]), **few, **NEEDS.get(f"{name}.{field}", {}))
    place = PLACES[kind]
    if before := BEFORE.get(f"{name}.{field}"):
        place = functools.partial(with_mixer, before=dataclasses.replace(config, **before))
    signs = {"optimizer": step_signs, "task": functools.partial(data_signs, folder=tmp_path), "mixer": mixer_signs}.get(
        kind, model_signs
    )
    tried = 0
    for other in valid_changes(config, field, hint, candidates(hint, getattr(config, field))):
        try:
            found = (kind == "mixer" and seen_alone(config, other)) or notices(signs, place(config), place(other))
        except ValueError:  # does not fit the width or the rows
            continue
        tried += 1
        if found:
            return
    pytest.fail(
        f"{kind} {name}: {field} was changed from {getattr(config, field)!r} to {tried} other valid values and nothing noticed. "
        f"Use it, take it away, or, where it works only beside another value, name that under {name}.{field} in NEEDS"
    )
