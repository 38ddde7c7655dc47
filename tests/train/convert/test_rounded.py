"""Models as they are published, bfloat16 in several files: what they say, what stays float32, and the same bits back from any mesh."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase as fnmatch

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.kernels import Tokens
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.convert.rounded import APART, GOLDEN, ROUNDED, publish
from plait.train.convert.exporting import export_model
from plait.train.convert.fitting import Source, examined
from plait.train.convert.importing import FLOAT32, ORIGINALS, import_model
from plait.train.convert.options import ImportOptions
from plait.train.convert.reading import CONFIG
from plait.train.convert.weights import INDEX, ConvertError
from plait.train.run import opened
from plait.train.run_folder.contents import CONFIG as RUN_CONFIG

NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
WAYS = (MeshConfig(data=1, fsdp=8), MeshConfig(data=1, tensor=2, fsdp=4))
OTHER_WAYS = {  # of sizes that these do not divide
    "gemma4_text_experts": (MeshConfig(data=2, tensor=2, fsdp=2), MeshConfig(data=1, tensor=2, fsdp=4)),
    "gemma4_text_small": (MeshConfig(data=2, tensor=2, fsdp=2), MeshConfig(data=1, fsdp=2)),
}
DEFAULT = ("deepseek_v3",)
"""Routers among the tensors that stay float32, stacked experts. The others are slow."""
FLA = "fla_"


@pytest.fixture(scope="module", params=NAMES)
def converted(request, compile_cache, tmp_path_factory):
    """The name of a golden model, its tensors as published, and a folder with it, its run on a mesh, what goes out of that, and what goes out
    of the same run on another mesh."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    tensors = publish(name, folder / "published")
    mesh, other = OTHER_WAYS.get(name, WAYS)
    import_model(folder / "published", folder / "run", ImportOptions(mesh=mesh))
    export_model(folder / "run", folder / "out0", shard_bytes=20_000)
    config = codec.load(ExperimentConfig, folder / "run" / RUN_CONFIG)
    codec.save(dataclasses.replace(config, mesh=other), folder / "run" / RUN_CONFIG)
    export_model(folder / "run", folder / "out1", shard_bytes=20_000)
    return name, tensors, folder


each = pytest.mark.parametrize(
    "converted", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in NAMES], indirect=True
)


@each
def test_what_is_said_is_theirs(converted):
    name, _, folder = converted
    golden, ids = load_file(GOLDEN / name / ROUNDED), load_file(GOLDEN / name / "golden.safetensors")["ids"]
    trained = opened(folder / "run")
    mesh = OTHER_WAYS.get(name, WAYS)[1]
    assert (trained.program.mesh.shape["fsdp"], trained.program.mesh.shape["tensor"]) == (mesh.fsdp, mesh.tensor)
    params, buffers = ({key: jnp.asarray(np.asarray(a)) for key, a in part.items()} for part in (trained.params, trained.buffers))
    model = trained.program.blueprint.build(params, buffers)
    whole = jnp.asarray(np.concatenate([ids, golden["greedy"]], axis=1))
    logits = quick_jit(lambda model, ids: model(Tokens(ids=ids))[0])(model, whole)
    assert_close(logits[:, : ids.shape[1] : APART], golden["logits"], dtype="float32")
    np.testing.assert_array_equal(logits.argmax(-1)[:, ids.shape[1] - 1 : -1], golden["greedy"])


def stacked(tensors):
    """Experts as they are written where `qwen3_5_moe_text` reads three tensors of each: two tensors a layer."""
    of = re.compile(r"(.*)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
    found = {name: match for name in tensors if (match := of.fullmatch(name))}
    out = {name: array for name, array in tensors.items() if name not in found}
    for layer in {match[1] for match in found.values()}:
        count = 1 + max(int(match[2]) for match in found.values() if match[1] == layer)
        gate, up, down = (
            np.stack([tensors[f"{layer}.experts.{i}.{kind}_proj.weight"] for i in range(count)])
            for kind in ("gate", "up", "down")
        )
        out |= {f"{layer}.experts.gate_up_proj": np.concatenate([gate, up], 1), f"{layer}.experts.down_proj": down}
    return out


@each
def test_the_same_bits_go_back_from_any_mesh(converted):
    name, saved, folder = converted
    names = {tensor.name: name for name, tensor in examined(folder / "published").weights.tensors.items()}
    tensors = {names.get(given, given): array for given, array in saved.items()}  # older names are written as newer ones
    tensors = stacked(tensors) if name.startswith("qwen3_5_moe_text") else tensors
    one, other = ({path.name: path.read_bytes() for path in (folder / out).iterdir()} for out in ("out0", "out1"))
    assert one == other
    files = set(json.loads(one[INDEX])["weight_map"].values())
    back = {key: array for file in files for key, array in load_file(folder / "out0" / file).items()}
    source = Source.of(folder / "published")
    left = source.family.ignored + (("lm_head.weight",) if source.model.tie_embeddings else ())
    assert len(files) > 1 and {key for key in tensors if not any(fnmatch(key, pattern) for pattern in left)} == back.keys()
    assert {key: (tensors[key].dtype, tensors[key].shape) for key in back} == {key: (a.dtype, a.shape) for key, a in back.items()}
    assert [key for key, array in back.items() if array.tobytes() != tensors[key].tobytes()] == []
    assert json.loads(one[CONFIG])["dtype"] == "bfloat16"


@pytest.mark.parametrize("converted", DEFAULT, indirect=True)
def test_a_list_of_names_that_is_none_is_refused(converted, tmp_path):
    _, _, folder = converted
    kept = folder / "run" / ORIGINALS / FLOAT32
    names = kept.read_text()
    try:
        kept.write_text("[1]")
        with pytest.raises(ConvertError, match=r"float32\.json must be a list of tensors' names; restore it, or say --dtype"):
            export_model(folder / "run", tmp_path / "out")
    finally:
        kept.write_text(names)
    assert not (tmp_path / "out").exists()


def lacks(*packages):
    """Skips where a package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}; see generate_rounded")


@pytest.mark.slow
@lacks("torch", "transformers")
@pytest.mark.parametrize("converted", [name for name in NAMES if not name.startswith(FLA)], indirect=True)
def test_transformers_says_the_same_of_what_goes_out(converted):
    """It loads it without custom code, every tensor in its place."""
    from plait.tests.train.convert.generate_rounded import check

    name, _, folder = converted
    check(name, folder / "out1")


FLA_CHECK = """
import sys
from pathlib import Path
from plait.tests.train.convert.generate_fla import install
install()
from plait.tests.train.convert.generate_rounded import check
check(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.mark.slow
@lacks("torch", "transformers", "fla")
@pytest.mark.parametrize("converted", [name for name in NAMES if name.startswith(FLA)], indirect=True)
def test_flash_linear_attention_says_the_same_of_what_goes_out(converted):
    """Its own classes do, in a process of their own, as `generate_fla` changes what is imported."""
    name, _, folder = converted
    words = [sys.executable, "-c", FLA_CHECK, name, str(folder / "out1")]
    ran = subprocess.run(words, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
