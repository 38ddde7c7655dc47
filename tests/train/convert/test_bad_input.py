"""Folders that cannot be taken in: each with what is wrong and what to do, and nothing written."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.launch import main
from plait.models.config import LMConfig
from plait.train.convert.exporting import home
from plait.train.convert.fitting import Source
from plait.train.convert.importing import appearing
from plait.train.convert.weights import INDEX, ONE, ConvertError

GOLDEN = Path(__file__).parent / "golden" / "llama"


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(GOLDEN, copy)
    (copy / "golden.safetensors").unlink()
    return copy


def edit_config(folder, **changes):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value != "gone"}))


def edit_weights(folder, **changes):
    """Tensors by name, None taking one out."""
    tensors = load_file(folder / ONE) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / ONE)


def edit_header(folder, change):
    """The text of the header by what `change` makes of it."""
    content = (folder / ONE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:end].decode().rstrip()).encode()
    (folder / ONE).write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def split(folder, shards: dict[str, list[str]], table: dict[str, str] | None = None):
    """The weights in several files with an index."""
    tensors = load_file(folder / ONE)
    rest = set(tensors) - {name for names in shards.values() for name in names}
    files = {**shards, "model-2.safetensors": sorted(rest)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    (folder / ONE).unlink()
    index = table or {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


Q = "model.layers.1.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"
CASES = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "control characters in a name": (
        lambda f: edit_weights(f, **{"model.\x1b[31m\nred": np.zeros(2, np.float32)}),
        r"has a tensor named 'model.\x1b[31m\nred', with control characters; do not trust it",
    ),
    "a folder of that name": (
        lambda f: ((f / ONE).unlink(), (f / ONE).mkdir()),
        "is a folder, and a file of that name is wanted",
    ),
    "an empty index": (
        lambda f: ((f / ONE).unlink(), (f / INDEX).write_text('{"weight_map": {}}')),
        "has no weight_map of tensors to files",
    ),
    "a link to nothing": (
        lambda f: ((f / ONE).unlink(), (f / ONE).symlink_to("nowhere")),
        "model.safetensors is a link to nowhere, which is no file; download again",
    ),
    "a pipe of that name": (
        lambda f: ((f / ONE).unlink(), os.mkfifo(f / ONE)),
        "is a pipe or device, and a file of that name is wanted",
    ),
    "an index that is a link to nothing": (
        lambda f: (f / INDEX).symlink_to("nowhere"),
        f"{INDEX} is a link to nowhere, which is no file; download again",
    ),
    "a tensor twice in a header": (
        lambda f: edit_header(f, lambda text: text[:-1] + f', "{Q}": {json.dumps(json.loads(text)[Q])}}}'),
        f"has a header that cannot be used: the name {Q!r} stands twice in one object",
    ),
    "a tensor without a name": (lambda f: edit_weights(f, **{"": np.zeros(2, np.float32)}), "has a tensor without a name"),
    "a type without end": (
        lambda f: edit_config(f, model_type="x" * 10_000),
        "xxx..., which is no name",
    ),
    "quantised around the language model": (
        lambda f: edit_config(f, quantization_config={"bits": 4}, text_config=json.loads((f / "config.json").read_text())),
        "quantised weights cannot be trained on",
    ),
    "index with a name without end": (
        lambda f: split(f, {}, {Q: "m" * 300 + ".safetensors"}),
        "mmm..., which is no plain name",
    ),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0, head_dim=None), "makes no model of this family"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "is not JSON that can be used"),
    "unknown type": (lambda f: edit_config(f, model_type="lama"), "'lama' is not registered; did you mean 'llama'"),
    "a type that waits": (
        lambda f: edit_config(f, model_type="zamba"),
        "model_type='zamba' waits for layers that share their parameters, which is not here yet",
    ),
    "experts that wait": (
        lambda f: edit_config(f, model_type="doge", is_moe=True, attention_bias=False),
        "is_moe=True has cross-domain experts, which wait for a channel mixer that retrieves experts by product keys",
    ),
    "indexers that wait": (
        lambda f: edit_config(f, model_type="glm_moe_dsa", indexer_types=["full", "shared"]),
        "indexer_types=['full', 'shared'] has layers that share a choice of tokens, which wait for one that travels between layers",
    ),
    "factors that differ by half": (
        lambda f: edit_config(f, model_type="minimax", mlp_alpha_factor=3.5, num_local_experts=2),
        "alpha factors of [1.0, 3.5] and beta factors of [1.0]: one of each can be used",
    ),
    "no type": (lambda f: edit_config(f, model_type="gone"), "has no model_type"),
    "missing field": (lambda f: edit_config(f, hidden_size="gone"), "hidden_size is missing"),
    "field of another kind": (lambda f: edit_config(f, hidden_size="24"), "hidden_size='24' must be int"),
    "unknown field": (
        lambda f: edit_config(f, sparse_attention=True),
        "has sparse_attention=True, which this family does not know",
    ),
    "unknown rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "longrope"}),
        "rope_type='longrope' is not supported",
    ),
    "unknown activation": (lambda f: edit_config(f, hidden_act="mish"), "hidden_act='mish' is not supported"),
    "layers without end": (
        lambda f: edit_config(f, num_hidden_layers=10**9),
        "num_hidden_layers=1000000000 must be from 1 to 4096",
    ),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantised weights cannot be trained on"),
    "heads that do not divide": (lambda f: edit_config(f, num_key_value_heads=4), "num_kv_heads=4 must divide num_heads=6"),
    "missing tensor": (lambda f: edit_weights(f, **{Q: None}), f"missing tensors: {Q}"),
    "unexpected tensor": (lambda f: edit_weights(f, extra=np.zeros(3, np.float32)), "tensors that nothing reads: extra"),
    "another shape": (lambda f: edit_weights(f, **{Q: np.zeros((3, 4), np.float32)}), f"another shape: {Q} [3, 4] for [36, 24]"),
    "integers": (
        lambda f: edit_weights(f, **{Q: np.zeros((36, 24), np.int8)}),
        f"quantised tensors, which cannot be trained on (give F32, F16, BF16, F64): {Q} is I8",
    ),
    "a head that is not the embedding": (
        lambda f: (
            edit_config(f, tie_word_embeddings=True),
            edit_weights(f, **{"lm_head.weight": np.ones((62, 24), np.float32)}),
        ),
        "has lm_head.weight beside model.embed_tokens.weight with other values",
    ),
    "window without a size": (
        lambda f: edit_config(
            f, model_type="qwen2", layer_types=["full_attention"] * 2 + ["sliding_attention"], sliding_window=None
        ),
        "has 'sliding_attention' and sliding_window is null",
    ),
    "rotary embedding that may be none": (
        lambda f: edit_config(
            f,
            model_type="olmo_hybrid",
            rope_parameters=None,
            mlp_bias=None,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
        'say {"rope_theta": null} for no positions',
    ),
    "cut short": (lambda f: (f / ONE).write_bytes((f / ONE).read_bytes()[:-100]), "is not a whole safetensors file"),
    "no weights": (lambda f: (f / ONE).unlink(), f"has no {ONE}"),
    "pickles": (lambda f: (f / ONE).rename(f / "pytorch_model.bin"), "pickled files, which run what they hold"),
    "index names a missing file": (
        lambda f: (split(f, {"model-1.safetensors": [Q]}), (f / "model-1.safetensors").unlink()),
        "names model-1.safetensors, which is not there",
    ),
    "index leads outside": (
        lambda f: split(f, {"model-1.safetensors": [Q]}, {Q: "../model-1.safetensors"}),
        "names the file '../model-1.safetensors', which is no plain name",
    ),
    "index names another file": (
        lambda f: split(f, {"model-1.safetensors": [Q]}, {Q: "model-2.safetensors", EMBED: "model-2.safetensors"}),
        f"puts {Q} into model-2.safetensors, which has it not",
    ),
    "a tensor twice": (
        lambda f: split(
            f, {"model-1.safetensors": [Q], "model-3.safetensors": [Q]}, {Q: "model-1.safetensors", "a": "model-3.safetensors"}
        ),
        f"{Q} is in model-1.safetensors and in model-3.safetensors",
    ),
}


@pytest.mark.parametrize("words", [["mlp", "linear_attention"], ["full_attention", "mlp", "moe"]])
def test_channels_that_are_mixed_before_tokens_are_refused(words, tmp_path):
    fields = json.loads((GOLDEN.parent / "nemotron_h" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "layers_block_type": words}))
    with pytest.raises(ConvertError, match="and the one before it neither linear_attention nor full_attention"):
        Source.of(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rwkv7", {"attn": {"layers": [1], "num_heads": 4}}, r"attn=\{.*\} is not supported"),
        ("rwkv7", {"norm_bias": False}, "norm_bias=False is not supported; True can be used"),
        (
            "rwkv7",
            {"value_dim": [48] * 4},
            r"value_dim=\[48, 48, 48, 48\] is not supported; 24 or \[24, 24, 24, 24\] can be used",
        ),
        ("hgrn2", {"expand_ratio": 5}, "head_dim=5 must divide d_model=24"),
    ],
)
def test_what_layers_of_fla_cannot_be_here_is_refused(name, change, message, tmp_path):
    fields = json.loads((GOLDEN.parent / f"fla_{name}" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(ConvertError, match=message):
        Source.of(tmp_path)


def test_bounds_of_each_layer_do_not_go_out():
    with pytest.raises(ConvertError, match=r"lower_bounds='layer' of hgrn2 are each layer's own; .* lower_bounds='model'"):
        home(LMConfig(d_model=256, num_layers=2, pattern="hgrn2", vocab_size=64), "hgrn2")


DESCRIBED = ("missing tensors", "tensors that", "another shape", "quantised tensors", "has lm_head")
"""What `inspect` describes, or does not read."""


@pytest.mark.parametrize(("spoil", "message"), CASES.values(), ids=CASES)
def test_it_is_refused_in_one_line(folder, spoil, message, capsys):
    spoil(folder)
    for words in (["inspect", str(folder)], ["import", str(folder), str(folder.parent / "run")]):
        if words[0] == "inspect" and message.startswith(DESCRIBED):
            continue
        assert main(["convert", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and error.count("\n") == 1, error
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_inspect_says_what_is_missing_and_left_over(folder, capsys):
    edit_weights(folder, **{Q: None, "extra": np.zeros(3, np.float32)})
    assert main(["convert", "inspect", str(folder)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["missing"].strip() == Q and lines["read by nothing"].strip() == "extra"
    assert lines["family"].strip() == "llama (LlamaForCausalLM)"


def test_rows_of_no_tokens_are_refused(folder, capsys):
    edit_config(folder, max_position_embeddings=0, vocab_size=264)
    wide = {name: np.resize(w, (264, 24)) for name, w in load_file(folder / ONE).items() if name in (EMBED, "lm_head.weight")}
    edit_weights(folder, **wide)
    ByteTokenizer().save(folder)
    assert main(["convert", "import", str(folder), str(folder.parent / "run")]) == 2
    assert "config.json: max_position_embeddings=0 must be at least 1; restore the file" in capsys.readouterr().err


def test_no_tokenizer_is_said_with_what_to_do(folder, capsys):
    assert main(["convert", "import", str(folder), str(folder.parent / "run")]) == 2
    assert "has no tokenizer that can be used" in capsys.readouterr().err


def test_a_folder_that_is_there_is_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main(["convert", "import", str(folder), str(tmp_path / "run")]) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_nothing_is_written_into_a_file(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["convert", "import", str(folder), str(tmp_path / "notes.txt" / "run")]) == 2
    assert "notes.txt', which is a file; give a folder elsewhere" in capsys.readouterr().err


def test_a_link_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert main(["convert", "import", str(folder), str(tmp_path / "link")]) == 2
    assert "is a link, which would be replaced" in capsys.readouterr().err and (tmp_path / "link").is_symlink()


def test_a_published_model_is_no_run(folder, tmp_path, capsys):
    assert main(["convert", "export", str(folder), str(tmp_path / "out")]) == 2
    assert "is a published model and no run folder; make one of it first" in capsys.readouterr().err


def test_what_keeps_a_model_from_a_family_is_said_field_by_field(folder):
    with pytest.raises(ConvertError, match=r"the model is no qwen3: mixers\.0\.\w+ is \w+ here and \w+ there"):
        home(Source.of(folder).model, "qwen3")


@pytest.mark.parametrize("words", [["exprt"], ["inspect"], ["import", "a"], ["export", "a", "b", "--model-typ", "llama"]])
def test_wrong_words_are_refused(words, capsys):
    assert main(["convert", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_said(folder, tmp_path, caplog):
    weights = load_file(folder / ONE)
    weights[Q][1, 2] = np.nan
    wide = {name: np.resize(w, (264, w.shape[1])) for name, w in weights.items() if name in (EMBED, "lm_head.weight")}
    edit_weights(folder, **{Q: weights[Q]}, **wide)
    edit_config(folder, vocab_size=264)
    ByteTokenizer().save(folder)
    assert main(["convert", "import", str(folder), str(tmp_path / "run")]) == 0
    (said,) = (record.getMessage() for record in caplog.records if "not finite" in record.getMessage())
    assert "mixer.q.kernel has numbers" in said


def test_a_signal_leaves_nothing_behind(tmp_path):
    with pytest.raises(SystemExit) as left, appearing(tmp_path / "run") as new:
        (new / "half").write_text("made")
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
