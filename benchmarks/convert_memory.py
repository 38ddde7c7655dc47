"""Host memory of an import of a model in the shape of Llama 7B: `python benchmarks/convert_memory.py FOLDER [--layers 32] [--devices 1]`.

The model is made in FOLDER, of random bfloat16 numbers in shards of at most 5 GB, as published ones are (13.5 GB with 32 layers; the run
takes as much again). An import on CPU holds in the host's memory what would be in that of devices, so that its peak is their share
and what the import itself needs. Anonymous memory is counted: pages of the mapped shards are the file cache's, which gives them up when
they are asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

D_MODEL, HEADS, D_FF, VOCAB = 4096, 32, 11008, 32000
SHARD_BYTES = 5 * 10**9
GB = 1e9


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Llama 7B with so many layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D_MODEL)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (D_MODEL, D_MODEL) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (D_FF, D_MODEL) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (D_MODEL, D_FF)}
        shapes |= {f"{at}{name}_layernorm.weight": (D_MODEL,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (D_MODEL,), "lm_head.weight": (VOCAB, D_MODEL)}


def make(folder: Path, layers: int) -> int:
    """Writes the model; bytes of its largest shard."""
    folder.mkdir()
    fields = {"model_type": "llama", "hidden_size": D_MODEL, "intermediate_size": D_FF, "num_attention_heads": HEADS}
    fields |= {"num_hidden_layers": layers, "vocab_size": VOCAB, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps({**fields, "hidden_act": "silu", "tie_word_embeddings": False}))
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = lambda shapes: sum(2 * math.prod(shape) for shape in shapes.values())
    for name, shape in tensors(layers).items():
        if size(shards[-1]) + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    rng, where = np.random.default_rng(0), {}
    for index, shapes in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(shapes, file)
        write(folder / file, shapes, rng)
    index = {"metadata": {"total_size": size(tensors(layers))}, "weight_map": where}
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


def measured(folder: Path, layers: int, devices: int) -> str:
    """A line on the import of a model that is made in `folder`."""
    model, run = folder / "model", folder / "run"
    shard = make(model, layers)
    share = sum(2 * math.prod(shape) for shape in tensors(layers).values())
    words = [sys.executable, "-m", "plait.launch", "convert", "import", str(model), str(run), "--param-dtype", "bfloat16"]
    flags = f"--xla_force_host_platform_device_count={devices}"
    most, seconds = peak([*words, "--mesh.fsdp", str(devices)], {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    allowed = 1.3 * shard + share
    return (
        f"{layers} layers, {share / GB:.2f} GB over {devices} devices, largest shard {shard / GB:.2f} GB: "
        f"peak {most / GB:.2f} GB, {(most - share) / GB:.2f} GB beyond the devices' share; {allowed / GB:.2f} GB allowed; {seconds:.0f} s"
    )


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--devices", type=int, default=1, help="that the arrays are laid over")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)  # what is there already is not removed at the end
    try:
        print(measured(options.folder, options.layers, options.devices))
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
