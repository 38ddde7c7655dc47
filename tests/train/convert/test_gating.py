"""Gates between all tokens and a window: what they mix, what asks for far tokens, and that heads on which nothing hangs close."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.mesh import MeshConfig
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.kernels import Tokens
from plait.launch import main
from plait.models.build import BuildContext
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.convert.reshapes import ONE_DEVICE, make_run, model_of
from plait.train.convert.linearize.gating import Gated, streaming
from plait.train.convert.linearize.ranking import rank
from plait.train.convert.linearize.recall_rows import ANSWER, CUE, recalling
from plait.train.convert.options import GatesConfig
from plait.train.convert.weights import ConvertError
from plait.train.run import opened

LENGTH, FAR, LAYER, HEADS = 64, 8, 1, range(2, 4)
"""Of `run`: in this layer these heads, which share their keys, are all that gives anything."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    def silence(params):
        (path,) = (path for path in params if path.endswith("mixer.o.kernel"))
        kept = np.zeros(6, bool)
        kept[HEADS] = True
        params[path][np.arange(3) != LAYER] = 0
        params[path][LAYER] *= np.repeat(kept, 4)[:, None]
        params[path.replace(".o.", ".q.")][LAYER] *= 4  # attends to few tokens, wherever they are

    return make_run(tmp_path_factory.mktemp("gated") / "run", model_of(num_kv_heads=3), silence, length=LENGTH)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The state of the union is what it was, and the state of the text too. " * 4)
    return path


@pytest.mark.parametrize("own", [{}, {"window_size": 9}])
def test_a_gate_is_between_all_that_is_seen_and_a_window(own):
    config = SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8, sink_logits=True, **own)
    window = dataclasses.replace(config, window_size=5, num_sink_tokens=0 if own else 3)
    all_seen, seen = (one.build(24, BuildContext(rngs=nnx.Rngs(0), seq_len=20)) for one in (config, window))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 20, 24)), jnp.float32)
    at = Tokens(None, jnp.asarray([[1] * 20, [1] * 6 + [2] * 14]))

    def heads(mixer):
        mix = lambda x, at: mixer.mix(mixer.project(x, at=at, state=None)[0], x, at=at)
        return np.asarray(quick_jit(mix)(x, at.placed(2, 20)))

    far, near = heads(all_seen), heads(seen)
    assert np.abs(far - near).max() > 0.1
    mixed = heads(Gated(all_seen, jnp.asarray([1.0, 0.25]), streaming(all_seen.mask, 5, 3)))
    assert_close(mixed[:, :, :2], far[:, :, :2])
    assert_close(mixed[:, :, 2:], 0.25 * far[:, :, 2:] + 0.75 * near[:, :, 2:])


@pytest.mark.parametrize("start", [False, True])
def test_rows_ask_for_what_stands_after_the_cue(run, start):
    trained = opened(run)
    data = dataclasses.replace(trained.program.config.data, document_start=start)
    program = dataclasses.replace(trained.program, config=dataclasses.replace(trained.program.config, data=data))
    text = np.random.default_rng(0).integers(0, 200, 400)
    read = recalling(dataclasses.replace(trained, program=program), 3, text, seed=0)
    ids, asked = read(0)
    assert ids.shape == asked.shape == (3, LENGTH) and ids.dtype == np.int32
    assert (ids[:, 0] == ByteTokenizer().bos_id).all() == start
    for row, told in zip(ids, asked, strict=True):
        assert told.sum() == ANSWER and told[-ANSWER - 1 : -1].all()
        key = row[-CUE - ANSWER :].tolist()
        places = [i for i in range(LENGTH) if row[i : i + len(key)].tolist() == key]
        assert len(places) == 2 and places[1] == LENGTH - len(key)
    assert (read(0)[0] == ids).all() and not (read(1)[0] == ids).all()


def test_gates_of_heads_on_which_nothing_hangs_close(run, text, capsys):
    config = GatesConfig(steps=40, rows=4, learning_rate=0.1, num_sink_tokens=1)
    found = rank(run, "gates", text=text, far=FAR, seed=0, gates=config)
    for layer, heads in found.heads.items():
        for head, gate in enumerate(heads):
            assert gate == pytest.approx(float(layer == LAYER and head in HEADS), abs=0.05), (layer, head)
    assert next(iter(found.layers)) == LAYER and found.layers[LAYER] == np.mean(found.heads[LAYER])
    assert found.kept_heads(2) == ([], [(LAYER, head) for head in HEADS])
    assert found.kept_heads(3) == found.kept_heads(2)  # the next two share keys
    with pytest.raises(ConvertError, match="keep_heads=1 must be at least 2, heads that share their keys"):
        found.kept_heads(1)
    assert found.kept_heads(17)[0] == sorted({0, 1, 2} - {max(found.kept_heads(17)[1])[0]})

    words = ["convert", "rank", str(run), "--by", "gates", "--text", str(text), "--far", str(FAR), "--keep-heads", "2"]
    words += ["--gates.steps", "40", "--gates.rows", "4", "--gates.learning-rate", "0.1", "--gates.num-sink-tokens", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == '--pattern "lolcats" --heads 1.2,1.3'
    assert f"{found.heads[LAYER][2]:.3f}" in out and "lolcats, but for 2, 3" in out


@pytest.mark.slow
def test_gates_are_those_of_one_device_on_any_mesh(text, tmp_path):
    config = GatesConfig(steps=12, rows=4, learning_rate=0.1, num_sink_tokens=1, penalty=0.3)
    found = []
    for i, mesh in enumerate([ONE_DEVICE, MeshConfig(data=1, fsdp=4), MeshConfig(data=2, tensor=2)]):
        spread = make_run(tmp_path / str(i), model_of(num_kv_heads=2), mesh=mesh, length=LENGTH)
        heads = rank(spread, "gates", text=text, far=FAR, seed=0, gates=config).heads
        found.append(np.float32([heads[layer] for layer in range(3)]))
    assert np.ptp(found[0]) > 0.1  # some have closed more than others
    for other in found[1:]:
        assert_close(other, found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "by=gates asks for keys in a text, as data.task=ppl asks for none; give --text FILE"),
        ({"far": LENGTH}, f"far={LENGTH} must be below the run's rows of {LENGTH} tokens; use 8"),
        ({"by": "recall", "text": "text.txt"}, "by=recall reads random ids and no text='text.txt'; leave --text out"),
        ({"by": "recall", "gates": GatesConfig(steps=2)}, "by=recall trains no gates; leave --gates"),
    ],
)
def test_what_cannot_be_asked_for(run, options, message):
    with pytest.raises(ConvertError, match=message):
        rank(run, **{"by": "gates", "text": None, "far": FAR, "seed": 0, "gates": GatesConfig(), **options})


def test_rows_have_place_for_a_key(tmp_path, text):
    short = make_run(tmp_path / "short", model_of(), length=47)
    with pytest.raises(ConvertError, match="rows of 47 tokens have no place for a key of 12, itself again, and as much text"):
        rank(short, "gates", text=text, far=FAR, seed=0, gates=GatesConfig())


def test_layers_or_heads_are_kept(run, capsys):
    assert main(["convert", "rank", str(run), "--keep", "1", "--keep-heads", "2"]) == 2
    assert "keep=1 layers and keep_heads=2 cannot both be" in capsys.readouterr().err
