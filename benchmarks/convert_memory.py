"""Host memory of an import of a Llama: `python benchmarks/convert_memory.py [FOLDER] [--shape 7b] [--layers N] [--devices 1]`.

Without FOLDER it is said what an import needs by the shapes of arrays and their layout. Else the model is made there, of random bfloat16
numbers in shards of at most 5 GB, as published ones are (7B: 13.5 GB; the run takes as much again). An import on CPU holds in the host's
memory what would be in that of devices, so that its peak is their share and what the import itself needs. Anonymous memory is counted:
pages of the mapped shards are the file cache's, which gives them up when they are asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.data.config import DataConfig
from plait.models.hf.base import MODEL_TYPES
from plait.models.hf.values import Values
from plait.train.convert.importing import untrained
from plait.train.state import Blueprint


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_ff: int
    vocab: int

    @property
    def fields(self) -> dict[str, Any]:
        """Those of config.json."""
        return {
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.d_model,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.d_ff,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        width, kv_width = self.d_model, self.kv_heads * self.d_model // self.heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, width)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes |= {f"{at}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
            shapes |= {f"{at}self_attn.{name}_proj.weight": (kv_width, width) for name in "kv"}
            shapes |= {f"{at}mlp.{name}_proj.weight": (self.d_ff, width) for name in ("gate", "up")}
            shapes |= {f"{at}mlp.down_proj.weight": (width, self.d_ff)}
            shapes |= {f"{at}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        return shapes | {"model.norm.weight": (width,), "lm_head.weight": (self.vocab, width)}


SHAPES = {"7b": Shape(32, 4096, 32, 32, 11008, 32000), "70b": Shape(80, 8192, 64, 8, 28672, 32000)}
SHARD_BYTES = 5 * 10**9
GB = 1e9


def make(folder: Path, shape: Shape) -> int:
    """Writes the model; bytes of its largest shard."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.fields))
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = lambda shapes: sum(2 * math.prod(shape) for shape in shapes.values())
    for name, dims in shape.tensors().items():
        if size(shards[-1]) + 2 * math.prod(dims) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = dims
    rng, where = np.random.default_rng(0), {}
    for index, shapes in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(shapes, file)
        write(folder / file, shapes, rng)
    index = {"metadata": {"total_size": size(shape.tensors())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(map(size, shards))


def write(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """A safetensors file of normal numbers in bfloat16, a tensor in memory at a time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for shape in shapes.values():
            numbers = rng.standard_normal(math.prod(shape), dtype=np.float32) * np.float32(0.02)
            file.write((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def peak(words: list[str], environment: dict[str, str]) -> tuple[int, float]:
    """Largest anonymous memory of a command in bytes, and its seconds. Raises CalledProcessError where it fails."""
    start, most = time.perf_counter(), 0
    process = subprocess.Popen(words, env={**os.environ, **environment})
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()  # there until `poll` has seen the end
        found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        most = max(most, *(1024 * int(kib) for kib in found), 0)
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return most, time.perf_counter() - start


def measured(folder: Path, shape: Shape, devices: int) -> str:
    """A line on the import of a model that is made in `folder`."""
    model, run = folder / "model", folder / "run"
    shard = make(model, shape)
    share = sum(2 * math.prod(dims) for dims in shape.tensors().values())
    words = [sys.executable, "-m", "plait.launch", "convert", "import", str(model), str(run), "--param-dtype", "bfloat16"]
    flags = f"--xla_force_host_platform_device_count={devices}"
    most, seconds = peak([*words, "--mesh.fsdp", str(devices)], {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    allowed = 1.3 * shard + share
    return (
        f"{shape.layers} layers, {share / GB:.2f} GB over {devices} devices, largest shard {shard / GB:.2f} GB: "
        f"peak {most / GB:.2f} GB, {(most - share) / GB:.2f} GB beyond the devices' share; {allowed / GB:.2f} GB allowed; {seconds:.0f} s"
    )


def planned(shape: Shape, devices: int) -> str:
    """A line on an import by one host with so many devices, by the layout of arrays alone."""
    values = Values(shape.fields, "config.json")
    model = MODEL_TYPES["llama"]().model(values)
    config = ExperimentConfig(
        name="imported",
        steps=1,
        optimizer=untrained(),
        model=dataclasses.replace(model, param_dtype="bfloat16"),
        data=DataConfig(batch_size=devices),
        mesh=MeshConfig(data=1, fsdp=devices),
    )
    mesh = AbstractMesh((1, 1, devices, 1, 1, 1), ("pipeline", "data", "fsdp", "expert", "context", "tensor"))
    blueprint = Blueprint(config)
    (shapes, _), (shardings, _) = blueprint.shapes(), blueprint.shardings(mesh)
    size = lambda dims, like: math.prod(dims) * like.dtype.itemsize
    share = sum(size(shardings[path].shard_shape(like.shape), like) for path, like in shapes.items())
    stacked = [size(like.shape, like) for path, like in shapes.items() if path.startswith("stack.periods")]
    alone = [size(like.shape, like) for path, like in shapes.items() if not path.startswith("stack.periods")]
    reading = max(*alone, max(stacked) // shape.layers)
    return (
        f"{shape.layers} layers over {devices} devices: {share / GB:.2f} GB a device; in the host's memory {2 * reading / GB:.2f} GB while "
        f"reading (a tensor, and what becomes of it), arrays of {max(stacked) / GB:.2f} GB in all while saving"
    )


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, default=None, help="in place of the shape's")
    parser.add_argument("--devices", type=int, default=1, help="that the arrays are laid over")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    shape = shape if options.layers is None else dataclasses.replace(shape, layers=options.layers)
    if options.folder is None:
        print(planned(shape, options.devices))
        return
    options.folder.mkdir(parents=True)  # what is there already is not removed at the end
    try:
        print(measured(options.folder, shape, options.devices))
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
