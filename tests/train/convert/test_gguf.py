"""GGUF files in: the same model as from safetensors, the tokenizer that they describe, and a clear refusal of what is broken."""

import importlib.util
import json
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from plait.launch import main
from plait.models.hf.base import MODEL_TYPES
from plait.models.hf.values import Values
from plait.models.lm import param_shapes
from plait.tests.train.convert.gguf_files import BYTE_CHARS, byte_level, described, gguf, named, write
from plait.train.convert.fitting import Source, examined, part_shape
from plait.train.convert.weights import ConvertError

GOLDEN = Path(__file__).parent / "golden"
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}


@pytest.mark.parametrize(("name", "more"), [("llama_tied", {}), ("qwen3", YARN)])
def test_it_is_the_model_that_safetensors_hold(name, more, tmp_path):
    source, golden = Source.of(GOLDEN / name), load_file(GOLDEN / name / "model.safetensors")
    found = examined(write(tmp_path / "a.gguf", described(source.fields, **more), named(golden, source.fields)))
    found.match.check(tmp_path)
    assert found.source.model == source.model
    assert set(found.weights) == set(golden)
    for tensor in golden:
        np.testing.assert_array_equal(found.weights.read(tensor), golden[tensor], err_msg=tensor)


SMALL = {
    "model_type": "llama",
    "vocab_size": 263,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}


def small() -> dict[str, np.ndarray]:
    """Tensors of `SMALL` by their published names."""
    draws, family = np.random.default_rng(0), MODEL_TYPES["llama"]()
    model = family.model(Values(SMALL))
    shapes = param_shapes(model)
    sizes = {
        name: size
        for line in family.table(model)
        for name, size in zip(line.tensors, line.transform.shapes([part_shape(place, shapes) for place in line.places]))
    }
    return {name: draws.normal(size=size).astype(np.float32) for name, size in sizes.items()}


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "small.gguf", described(SMALL) | byte_level(), named(small(), SMALL))


def test_in_and_out_again(file, compile_cache, tmp_path, capsys):
    """The tensors are what was published; config, tokenizer and chat template come with them."""
    run, folder = tmp_path / "run", tmp_path / "out"
    assert main(["convert", "inspect", str(file)]) == 0
    assert "llama (LlamaForCausalLM)" in capsys.readouterr().out
    assert main(["convert", "import", str(file), str(run)]) == 0
    assert main(["convert", "export", str(run), str(folder)]) == 0
    tensors, expected = load_file(folder / "model.safetensors"), small()
    assert tensors.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(tensors[name], expected[name], err_msg=name)
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in SMALL} == SMALL and (config["bos_token_id"], config["eos_token_id"]) == (1, 0)
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    assert main(["generate", str(run), "--num-tokens", "4", "--prompt", "the 12"]) == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_are_read_and_go_out_as_halves(dtype, tmp_path):
    tensors = {name: tensor if tensor.ndim == 1 else tensor.astype(dtype) for name, tensor in small().items()}
    found = examined(write(tmp_path / "half.gguf", described(SMALL) | byte_level(), named(tensors, SMALL)))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.weights.read(name), tensor, err_msg=name)
    assert found.source.fields["dtype"] == np.dtype(dtype).name


def test_frequencies_of_llama_3_are_its_scaling(tmp_path):
    """The file has what divides them, not the options that they follow from."""
    fields = SMALL | {"head_dim": 64, "num_hidden_layers": 1}
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    positions = MODEL_TYPES["llama"]().model(Values(fields | {"rope_parameters": scaling})).mixers["softmax"].positions
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
    divisors = (plain / positions.frequencies(64)).astype(np.float32)
    described_ = described(fields, **{"rope.freq_base": 5e5})
    find = lambda divisors: Source.of(write(tmp_path / "a.gguf", described_, {"rope_freqs.weight": divisors})).model.mixers[
        "softmax"
    ]
    assert find(divisors).positions == positions
    with pytest.raises(ConvertError, match=r"rope_freqs.weight is not that of Llama 3.1 or 3.2"):
        find(divisors[::-1].copy())


def test_quantised_tensors_need_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    fields, width = SMALL | {"hidden_size": 32, "num_hidden_layers": 1}, 32
    blocks = np.zeros(263, np.dtype([("scale", np.float16), ("numbers", np.int8, width)]))
    path = write(
        tmp_path / "a.gguf", described(fields) | byte_level(), {"token_embd.weight": (8, (263, width), blocks.tobytes())}
    )
    weights = Source.of(path).reader.weights()
    with pytest.raises(ConvertError, match=r"keeps token_embd.weight as Q8_0.* pip install 'plait\[gguf\]'"):
        weights.read("model.embed_tokens.weight")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf, of the extra gguf")
def test_quantised_tensors_are_numbers(tmp_path):
    fields, draws = SMALL | {"hidden_size": 32, "num_hidden_layers": 1}, np.random.default_rng(0)
    blocks = np.zeros(263, np.dtype([("scale", np.float16), ("numbers", np.int8, 32)]))
    blocks["scale"], blocks["numbers"] = draws.uniform(size=263), draws.integers(-128, 128, size=(263, 32))
    path = write(tmp_path / "a.gguf", described(fields) | byte_level(), {"token_embd.weight": (8, (263, 32), blocks.tobytes())})
    read = Source.of(path).reader.weights().read("model.embed_tokens.weight")
    np.testing.assert_array_equal(read, blocks["scale"].astype(np.float32)[:, None] * blocks["numbers"])


def tokenizer_of(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(dict(Source.of(path).reader.beside())["tokenizer.json"].decode())


def test_byte_level_tokenizer(file):
    """Merges in their order, digits alone, special tokens and those of users whole."""
    tokens = lambda text: tokenizer_of(file).encode(text).tokens
    assert tokens("the the 12½") == ["t", "he", "Ġthe", "Ġ", "1", "2", "Â", "½"]
    assert tokens("<|start|>a<think> <|end|>") == ["<|start|>", "a", "<think>", "Ġ", "<|end|>"]
    ours = Source.of(file).reader.tokenizer()
    for text in ("the the 12½ naïve 日本 \r\n\t x", "<|end|> is text here"):
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eos_id, ours.bos_id, ours.token_bytes(262)) == (0, 1, b"<think>")


@pytest.mark.parametrize(("add", "first"), [(True, ["<|start|>"]), (False, [])])
def test_the_start_token_comes_where_the_file_says_so(add, first, tmp_path):
    path = write(tmp_path / "a.gguf", described(SMALL) | byte_level(add_bos_token=add), named(small(), SMALL))
    assert tokenizer_of(path).encode("a").tokens == [*first, "a"]
    assert Source.of(path).reader.tokenizer().encode("a").tolist() == [2 + BYTE_CHARS.index("a")]


def test_sentencepiece_tokenizer(tmp_path):
    """Pairs are merged by the score of what they make; what is no piece is bytes."""
    pieces = {"▁": -9.0, "a": -8.0, "b": -7.0, "c": -6.0, "bc": -1.0, "▁a": -3.0, "ab": -2.0, "▁ab": -4.0}
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "model": "llama",
        "tokens": names,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "scores": [*[0.0] * 259, *pieces.values()],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    fields = {f"tokenizer.ggml.{key}": one for key, one in metadata.items()}
    path = write(tmp_path / "a.gguf", described(SMALL) | fields, named(small(), SMALL))
    encode = lambda text: tokenizer_of(path).encode(text).tokens
    assert encode("ab") == ["<s>", "▁ab"] and encode("abc a") == ["<s>", "▁a", "bc", "▁a"]
    assert encode("aé") == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    ours = Source.of(path).reader.tokenizer()
    assert ours.decode(ours.encode("abc aé a")) == "abc aé a"


def changed(**more):
    """The file with other metadata; None takes some out."""
    metadata = described(SMALL) | byte_level() | {key.replace("__", "."): one for key, one in more.items()}
    return gguf({key: one for key, one in metadata.items() if one is not None}, named(small(), SMALL))


def with_tensor(tensor) -> bytes:
    return gguf(described(SMALL) | byte_level(), named(small(), SMALL) | {"extra": tensor})


def after(content: bytes, mark: bytes, new: bytes) -> bytes:
    """The bytes behind the first `mark` replaced."""
    at = content.index(mark) + len(mark)
    return content[:at] + new + content[at + len(new) :]


HUGE = struct.pack("<Q", 1 << 60)
BROKEN = {
    "empty": (lambda good: b"", "cannot be read"),
    "no magic": (lambda good: b"GGML" + good[4:], "is no GGUF file: it does not start with GGUF"),
    "another version": (lambda good: good[:4] + struct.pack("<I", 1) + good[8:], "is of version 1; little-endian files of version 2 or 3"),
    "big-endian": (lambda good: good[:4] + struct.pack(">I", 3) + good[8:], "is big-endian"),
    "cut in its header": (lambda good: good[:700], "is cut short: at byte"),
    "cut in its tensors": (lambda good: good[:-5000], "ends behind its end"),
    "tensors without end": (lambda good: good[:8] + HUGE + good[16:], "download it again"),
    "values without end": (lambda good: good[:16] + HUGE + good[24:], "is cut short"),
    "a text without end": (lambda good: good[:24] + HUGE + good[32:], f"says that {1 << 60} more follow"),
    "a list without end": (lambda good: after(good, b"token_type" + struct.pack("<II", 9, 4), HUGE), f"says that {1 << 62} more follow"),
    "a value of no type": (lambda good: after(good, b"architecture", struct.pack("<I", 77)), "has a value of type 77"),
    "lists in lists": (lambda good: after(good, b"token_type" + struct.pack("<I", 9), struct.pack("<I", 9)), "has a value of type 9"),
    "a text that is none": (lambda good: after(good, b"architecture" + struct.pack("<IQ", 8, 5), b"\xff"), "a text that is not UTF-8"),
    "a key twice": (lambda good: good.replace(b"llama.context_length", b"general.architecture"), "has 'general.architecture' twice"),
    "no alignment": (lambda good: changed(general__alignment=0), "has general.alignment=0"),
    "many axes": (lambda good: with_tensor(np.zeros([1] * 5, np.float32)), "gives 'extra' 5 axes"),
    "an unknown type": (lambda good: with_tensor((99, (4,), bytes(16))), "keeps 'extra' in the type 99, which is not known here"),
    "part of a block": (lambda good: with_tensor((2, (4,), bytes(18))), "keeps 'extra' [4] in blocks of 32, which its rows are not"),
    "a tensor of more than all": (lambda good: with_tensor((0, (1 << 40, 1 << 40), b"")), "ends behind its end"),
    "a tensor twice": (lambda good: good.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"), "has blk.0.attn_norm.weight twice"),
    "a tensor that is none": (lambda good: with_tensor(np.zeros(4, np.float32)), "tensors that nothing reads: extra"),
    "no architecture": (lambda good: changed(general__architecture=None), "has general.architecture=None, and llama, qwen2, qwen3 can be read"),
    "another architecture": (lambda good: changed(general__architecture="mamba"), "has general.architecture='mamba'"),
    "a field missing": (lambda good: changed(llama__embedding_length=None), "embedding_length is missing"),
    "heads by layer": (lambda good: changed(**{"llama.attention.head_count": [6, 6, 6]}), "attention.head_count=[6, 6, 6] must be int"),
    "no heads": (lambda good: changed(**{"llama.attention.head_count": 0}), "attention.head_count=0"),
    "more layers than tensors": (lambda good: changed(llama__block_count=1 << 31), "block_count=2147483648 and there are"),
    "experts": (lambda good: changed(llama__expert_count=8), "expert_count=8 is not supported"),
    "part of a head turned": (lambda good: changed(**{"llama.rope.dimension_count": 4}), "rope.dimension_count=4 is not supported; 6"),
    "an unknown field": (lambda good: changed(**{"llama.attention.sliding_window": 8}), "has attention.sliding_window=8, which this family"),
    "an unknown scaling": (lambda good: changed(**{"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}), "'longrope'"),
    "unknown words": (lambda good: changed(tokenizer__ggml__pre="viking"), "has tokenizer.ggml.pre='viking'; gpt-2"),
    "an unknown tokenizer": (lambda good: changed(tokenizer__ggml__model="t5"), "has tokenizer.ggml.model='t5'; gpt2 or llama can be read"),
    "no tokens": (lambda good: changed(tokenizer__ggml__tokens=None), "has no tokenizer.ggml.tokens"),
    "a token twice": (lambda good: changed(tokenizer__ggml__tokens=["a", "a"]), "has no tokenizer.ggml.tokens in which each"),
    "types of some tokens": (lambda good: changed(tokenizer__ggml__token_type=[1, 1]), "has no tokenizer.ggml.token_type for each"),
    "merges of no tokens": (lambda good: changed(tokenizer__ggml__merges=["x yz"]), "holds no whole tokenizer"),
    "merges of one": (lambda good: changed(tokenizer__ggml__merges=["x"]), "merges that are not of two tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line(file, spoil, message, capsys):
    file.write_bytes(spoil(file.read_bytes()))
    assert main(["convert", "import", str(file), str(file.parent / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1, error
    assert [path.name for path in file.parent.iterdir()] == [file.name]
