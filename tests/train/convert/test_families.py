"""Each family against models that `transformers` saved: logits, greedy tokens, and the same bits back."""

import dataclasses
import importlib.util
import json
import shutil
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from plait.configs.mesh import MeshConfig
from plait.kernels import Tokens
from plait.models.build import Moved
from plait.models.config import LMConfig
from plait.models.hf.base import MODEL_TYPES
from plait.models.lm import LM, learned_shapes
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.train.convert.arrays import part_of, read_arrays, written
from plait.train.convert.exporting import home
from plait.train.convert.fitting import Source, examined
from plait.train.convert.weights import ONE
from plait.train.mesh import make_mesh, sharding

GOLDEN = Path(__file__).parent / "golden"
LEARNED = nnx.filterlib.Any(nnx.Param, Moved)
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.fixture(scope="module", params=NAMES)
def imported(request):
    """Source, weights, lines, and the model with its arrays on one device."""
    found = examined(GOLDEN / request.param)
    found.match.check(found.source.folder)
    model = build(found.source.model, found.lines, found.weights, make_mesh(MeshConfig(data=1)))
    return found.source, found.weights, found.lines, model


def build(config, lines, weights, mesh) -> LM:
    abstract = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0), seq_len=64))
    graph, learned, rest = nnx.split(abstract, LEARNED, ...)
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(learned)}
    layouts = {name: sharding(mesh, v.get_metadata()["axes"], v.shape, name) for name, (_, v) in flat.items()}
    shapes = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, (_, v) in flat.items()}
    arrays = read_arrays(lines, weights.read, shapes, layouts)
    filled = nnx.from_flat_state([(path, variable.replace(arrays[name])) for name, (path, variable) in flat.items()])
    made = jax.jit(lambda: nnx.split(LM(config, rngs=nnx.Rngs(0), seq_len=64), LEARNED, ...)[2])
    buffers = made() if jax.tree.leaves(rest) else rest
    return nnx.merge(graph, filled, buffers)


def test_logits_and_greedy_tokens_are_theirs(imported):
    source, _, _, model = imported
    golden = load_file(GOLDEN / source.folder.name / "golden.safetensors")
    ids, greedy = golden["ids"], golden["greedy"]
    whole = jnp.asarray(np.concatenate([ids, greedy], axis=1))
    logits = quick_jit(lambda model, ids: model(Tokens(ids=ids))[0])(model, whole)
    assert_close(logits[:, : ids.shape[1]], golden["logits"], dtype="float32")
    np.testing.assert_array_equal(logits.argmax(-1)[:, ids.shape[1] - 1 : -1], greedy)


def goes_back(model, weights, lines) -> list[str]:
    """The tensors that a model gives, each of which is what was read."""
    arrays = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    names = []
    for name, line, index in written(lines):
        back = line.transform.write([part_of(arrays[place.path], place) for place in line.places])[index]
        there = weights.read(name)
        assert (back.shape, back.dtype) == (there.shape, there.dtype), name
        np.testing.assert_array_equal(back, there, err_msg=name)
        names.append(name)
    return names


def test_the_same_bits_go_back(imported):
    source, weights, lines, model = imported
    names = goes_back(model, weights, lines)
    left = source.family.ignored + (("lm_head.weight",) if source.model.tie_embeddings else ())
    assert sorted(names) == sorted(name for name in weights if not any(fnmatch(name, pattern) for pattern in left))


def test_the_family_is_found_by_what_the_model_is(imported):
    source, _, _, model = imported
    family, fields = home(model.config, source.family.name)
    assert family == source.family
    known = {key: value for key, value in source.fields.items() if value is not None}
    assert {key: fields[key] for key in fields.keys() & known.keys() if fields[key] != known[key]} == {}
    assert {
        key for key in fields.keys() & known.keys() if type(fields[key]) is not type(known[key])
    } == set()  # as strict readers want
    found, _ = home(model.config)
    assert found.name != "plait"


def test_what_stays_float32_in_files_does_in_models(imported):
    source, _, lines, _ = imported
    shapes = learned_shapes(dataclasses.replace(source.model, param_dtype="bfloat16"))
    kept = {place.path for line in lines if line.float32 for place in line.places}
    assert {path for path, like in shapes.items() if like.dtype == jnp.float32} == kept


SPREAD = {"llama", "gpt2", "deepseek_v3", "qwen3_moe", "qwen3_next", "mamba2", "falcon_h1", "gemma3_text"}
"""Families that are laid over several devices by default: of each way that tensors are joined, split or turned. The rest are slow."""


@pytest.mark.parametrize(
    "imported", [pytest.param(name, marks=() if name in SPREAD else pytest.mark.slow) for name in NAMES], indirect=True
)
def test_several_devices_hold_and_give_the_same(imported):
    source, weights, lines, model = imported
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = build(source.model, lines, weights, mesh)
    for one, other in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(spread)), strict=True):
        np.testing.assert_array_equal(one, other)
    goes_back(spread, weights, lines)


def test_files_saved_without_the_head_and_with_buffers_are_read(tmp_path):
    """As GPT-2 is published: names without the base, masks of bytes among the weights."""
    folder = tmp_path / "gpt2"
    shutil.copytree(GOLDEN / "gpt2", folder)
    tensors = {name.removeprefix("transformer."): a for name, a in load_file(folder / ONE).items()}
    save_file({**tensors, "h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8)}, folder / ONE)
    found, whole = examined(folder), examined(GOLDEN / "gpt2")
    found.match.check(folder)
    for line in found.lines:
        for name in line.tensors:
            np.testing.assert_array_equal(found.weights.read(name), whole.weights.read(name))


def test_layers_behind_the_last_are_left_out_where_the_config_counts_them(tmp_path):
    """As DeepSeek-V3 is published, with a layer that predicts the token after the next."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "deepseek_v3", folder)
    depth = Source.of(folder).model.num_layers
    extra = {f"model.layers.{depth}.{name}.weight": np.ones(24, np.float32) for name in ("enorm", "input_layernorm")}
    save_file({**load_file(folder / ONE), **extra}, folder / ONE)
    assert sorted(examined(folder).match.unexpected) == sorted(extra)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_nextn_predict_layers": 1}))
    examined(folder).match.check(folder)


def test_keys_and_values_of_layers_that_read_those_of_others_are_left_out(tmp_path):
    """As the small models of Gemma 4 are published; of other layers they are not."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "gemma4_text_small", folder)
    tensors = load_file(folder / ONE)
    extra = {
        f"model.layers.{index}.self_attn.{name}.weight": np.ones(6, np.float32)
        for index in (5, 8)
        for name in ("k_proj", "k_norm")
    }
    save_file({**tensors, **extra}, folder / ONE)
    examined(folder).match.check(folder)
    save_file({**tensors, "model.layers.0.self_attn.v_norm.weight": np.ones(6, np.float32)}, folder / ONE)
    assert examined(folder).match.unexpected == ["model.layers.0.self_attn.v_norm.weight"]


def test_every_family_has_a_golden_model():
    shown = {Source.of(GOLDEN / name).family.name for name in NAMES}
    assert set(MODEL_TYPES.all()) - {"plait"} == shown


def test_families_name_the_mixers_that_their_golden_models_have():
    shown: dict[str, set[str]] = {}
    for name in NAMES:
        source = Source.of(GOLDEN / name)
        shown.setdefault(source.family.name, set()).update(mixer.name for mixer in source.model.layer_mixers)
    assert {name: set(MODEL_TYPES[name].mixers) for name in shown} == shown


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers, of the extra oracle")
def test_transformers_loads_what_goes_out(imported, tmp_path):
    """Without custom code, every tensor in its place, and its logits are the golden ones."""
    import torch
    import transformers

    source, _, lines, model = imported
    if not hasattr(transformers, source.family.architecture):
        pytest.skip(f"transformers has no {source.family.architecture} of its own")
    arrays = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    tensors = {
        name: line.transform.write([part_of(arrays[place.path], place) for place in line.places])[index]
        for name, line, index in written(lines)
    }
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, tmp_path / ONE, metadata={"format": "pt"})
    _, fields = home(model.config, source.family.name)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **fields}))
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path, output_loading_info=True, attn_implementation="eager")
    lost = {name for name in info.pop("missing_keys") if not any(fnmatch(name, pattern) for pattern in source.family.ignored)}
    assert not lost and not any(info.values()), info
    golden = load_file(GOLDEN / source.folder.name / "golden.safetensors")
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(golden["ids"])).logits.numpy()
    assert_close(logits, golden["logits"], dtype="float32")


def assert_same_model(*folders):
    """Files of two forms are read as one model, each of whose tensors go back as they were."""
    models = []
    for folder in folders:
        found = examined(folder)
        found.match.check(folder)
        models.append(build(found.source.model, found.lines, found.weights, make_mesh(MeshConfig(data=1))))
        goes_back(models[-1], found.weights, found.lines)
    for one, other in zip(*(jax.tree.leaves(nnx.state(model)) for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


def test_experts_that_lie_in_two_tensors_are_read(tmp_path):
    """As Qwen 3.5 is published: in a multimodal model, gate and up of all experts in one tensor, heads that predict further ahead."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3_5_moe_text", folder)
    tensors = load_file(folder / ONE)
    apart = {name: tensors.pop(name) for name in list(tensors) if ".mlp.experts." in name}
    stack = lambda layer, part: np.stack([apart[f"{layer}.{i}.{part}_proj.weight"] for i in range(3)])
    for layer in {name.partition(".experts")[0] + ".experts" for name in apart}:
        tensors[f"{layer}.gate_up_proj"] = np.concatenate([stack(layer, "gate"), stack(layer, "up")], axis=1)
        tensors[f"{layer}.down_proj"] = stack(layer, "down")
    tensors = {name.replace("model.", "model.language_model.", 1): a for name, a in tensors.items()}
    save_file({**tensors, "mtp.norm.weight": np.ones(4, np.float32)}, folder / ONE)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "text_config": fields}))
    assert_same_model(folder, GOLDEN / "qwen3_5_moe_text")


def test_mixes_that_lie_in_one_tensor_are_read(tmp_path):
    """As older files of RWKV-7 have them."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "fla_rwkv7", folder)
    tensors = load_file(folder / ONE)
    for layer in range(4):
        apart = [tensors.pop(f"model.layers.{layer}.attn.x_{name}")[0] for name in "rwkvag"]
        tensors[f"model.layers.{layer}.attn.x_x"] = np.concatenate(apart)
    save_file(tensors, folder / ONE)
    assert_same_model(folder, GOLDEN / "fla_rwkv7")


@pytest.mark.parametrize(
    ("pattern", "name"),
    {"gated_deltanet*3,softmax": "gated_deltanet", "deltanet,softmax": "delta_net", "kda": "kda", "gla,softmax": "gla"}.items(),
)
def test_hybrids_made_here_have_a_home(pattern, name):
    """Where their norms have one epsilon, as there."""
    model = LMConfig(d_model=512, num_layers=4, pattern=pattern, vocab_size=64, norm_eps=1e-5)
    family, fields = home(model)
    assert family.name == name and bool(fields["attn"]) == ("softmax" in pattern)
