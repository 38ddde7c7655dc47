"""Batches: the same whatever the host count, resumed anywhere, every token once an epoch, every byte counted."""

import json
import logging
import random

import numpy as np
import pytest

from plait.data.config import DataConfig, DataError
from plait.data.loader import build_data
from plait.data.tokenizers.files import load_tokenizer
from tests.data.conftest import make_texts


@pytest.fixture
def build(corpus_folder, tmp_path):
    """Builds data from the small corpus, all with one cache."""

    def make(*, run="run", rows=None, **fields):
        fields = {"tokenizer": "byte", "seq_len": 32, "batch_size": 8, "val_fraction": 0.1, **fields}
        config = DataConfig(source=str(corpus_folder), cache_dir=str(tmp_path / "cache"), **fields)
        return build_data(config, tmp_path / run, rows=rows)

    return make


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)


def epochs(data, count, rows=8):
    """The rows of the first epochs, [count * R, T] for targets and mask."""
    batches = take(data.train(), -(-count * data.facts["num_train_rows"] // rows))
    joined = [np.concatenate(arrays)[: count * data.facts["num_train_rows"]] for arrays in zip(*batches)]
    return type(batches[0])(*joined)


@pytest.mark.parametrize("document_start", [True, False])
def test_an_epoch_predicts_every_training_token_once(build, document_start):
    data = build(document_start=document_start)
    both = epochs(data, 2)
    assert both.loss_mask.sum() == 2 * data.facts["num_train_tokens"]
    per_epoch = np.split(both.targets, 2)
    masks = np.split(both.loss_mask > 0, 2)
    first, second = (np.bincount(t[m], minlength=257) for t, m in zip(per_epoch, masks))
    np.testing.assert_array_equal(first, second)
    if document_start:
        val = np.concatenate([b.targets[b.loss_mask > 0] for b in data.val])
        held = np.bincount(val, minlength=257)
        text = "".join(make_texts(60)).encode()
        np.testing.assert_array_equal((first + held)[:256], np.bincount(np.frombuffer(text, np.uint8), minlength=256))
        assert first[256] + held[256] == 60


def test_epochs_cut_and_order_the_rows_differently(build):
    data = build()
    first, second = np.split(epochs(data, 2).tokens, 2)
    assert len({row.tobytes() for row in first} & {row.tobytes() for row in second}) < len(first) / 4


def test_bits_per_byte_counts_every_byte_of_the_held_out_documents(build):
    for tokenizer in ("byte", "bpe"):
        data = build(tokenizer=tokenizer, vocab_size=300 if tokenizer == "bpe" else None, run=tokenizer)
        sizes = data.tokenizer.bytes_per_token
        predicted = sum(int(np.sum(sizes[batch.targets] * batch.loss_mask)) for batch in data.val)
        assert predicted == data.facts["num_val_bytes"]
        assert data.facts["num_val_bytes"] + data.facts["num_train_bytes"] == sum(len(text.encode()) for text in make_texts(60))
        train = epochs(data, 1)
        assert int(np.sum(sizes[train.targets] * train.loss_mask)) == data.facts["num_train_bytes"]
        assert sum(batch.loss_mask.sum() for batch in data.val) == data.facts["num_val_tokens"]


def test_two_builds_give_the_same_batches(build):
    assert_equal(take(build(run="a").train(), 5), take(build(run="b").train(), 5))
    assert_equal(build(run="a").val, build(run="b").val)


def test_seed_changes_the_order(build):
    one, two = (next(build(seed=seed).train()).tokens for seed in (0, 1))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_each_batch_in_order(build, hosts):
    whole = build()
    parts = [build(rows=rows) for rows in np.split(np.arange(8), hosts)]
    count = whole.facts["num_train_rows"] // 8 + 3  # past the end of the epoch
    shares = zip(*(take(part.train(), count) for part in parts))
    joined = [type(share[0])(*(np.concatenate(arrays) for arrays in zip(*share))) for share in shares]
    assert_equal(take(whole.train(), count), joined)
    assert {len(part.val) for part in parts} == {len(whole.val)}
    joined = [type(share[0])(*(np.concatenate(arrays) for arrays in zip(*share))) for share in zip(*(part.val for part in parts))]
    assert_equal(whole.val, joined)


def test_resume_is_exact_at_any_step_and_on_other_host_counts(build):
    rng = random.Random(0)
    data, halves = build(), [build(rows=rows) for rows in np.split(np.arange(8), 2)]
    reference = take(data.train(), 200)
    for step in [0, 1, 150, *rng.sample(range(150), 5)]:
        iterator = data.train()
        take(iterator, step)
        state = json.loads(json.dumps(iterator.get_state()))  # while later batches are being made
        assert iterator.step == state["step"] == step
        again = data.train()
        take(again, 3)  # and is then moved
        again.set_state(state)
        assert_equal(take(again, 4), reference[step : step + 4])
        for host, half in enumerate(halves):
            other = half.train()
            other.set_state(state)
            assert_equal([next(other)], [type(b)(*(a[4 * host : 4 * host + 4] for a in b)) for b in reference[step : step + 1]])


def test_state_of_other_data_is_refused_with_the_field(build, corpus_folder):
    state = build(run="a").train().get_state()
    for field, value in {"seed": 1, "seq_len": 16, "batch_size": 4, "document_start": False, "val_fraction": 0.2}.items():
        with pytest.raises(DataError, match=f"belongs to other data: {field} was .* and is {value!r}; resume with"):
            build(run="a", **{field: value}).train().set_state(state)
    with pytest.raises(DataError, match="other data: tokenizer was"):
        build(run="b", tokenizer="bpe").train().set_state(state)
    (corpus_folder / "more.txt").write_text("more")
    with pytest.raises(DataError, match="other data: corpus was"):
        build(run="a").train().set_state(state)
    for step in (-1, "3", None):
        with pytest.raises(DataError, match="not a number of batches"):
            build(run="b2").train().set_state({**build(run="b2").identity, "step": step})


def test_validation_is_padded_to_whole_batches_and_can_be_indexed(build):
    data = build(batch_size=48)
    last = data.val[-1]
    assert last.tokens.shape == (48, 32)
    assert last.segment_ids[-1].sum() == last.loss_mask[-1].sum() == 0
    assert_equal([last], [list(data.val)[-1]])
    with pytest.raises(IndexError):
        data.val[len(data.val)]
    # A host that has no real row of the last batch still gets one of padding.
    assert build(batch_size=48, rows=[47]).val[-1].loss_mask.sum() == 0


def test_no_validation(build):
    data = build(val_fraction=0.0)
    assert len(data.val) == data.facts["num_val_tokens"] == data.facts["num_val_bytes"] == 0
    assert list(data.val) == []


def test_batch_larger_than_an_epoch_repeats_rows_with_a_warning(build, caplog):
    with caplog.at_level(logging.WARNING, "plait.data"):
        data = build(batch_size=2000)
    assert "is more than the" in caplog.text
    assert next(data.train()).tokens.shape == (2000, 32)


def test_corpus_shorter_than_a_row_says_how_long_it_is(build):
    total = sum(len(text.encode()) for text in make_texts(60))
    with pytest.raises(
        DataError, match=rf"data\.seq_len=999999 is more than the \d+ tokens .*{total} tokens.*data\.seq_len=\d+ or less"
    ):
        build(seq_len=999_999)


def test_any_rows_of_a_batch_can_be_read(build):
    """As where the devices of a host hold rows that do not follow one another."""
    whole, some = build(batch_size=24), build(batch_size=24, rows=[1, 2, 9, 23])
    count = whole.facts["num_train_rows"] // 24 + 3
    picked = lambda batch: type(batch)(*(array[[1, 2, 9, 23]] for array in batch))
    assert_equal(take(some.train(), count), [picked(batch) for batch in take(whole.train(), count)])
    assert_equal(some.val, [picked(batch) for batch in whole.val])


def test_tokenizer_is_kept_with_the_run_and_used_again(build, tmp_path, corpus_folder, monkeypatch):
    data = build(tokenizer="bpe", vocab_size=300)
    assert data.vocab_size == 300
    assert load_tokenizer(tmp_path / "run").fingerprint == data.tokenizer.fingerprint
    monkeypatch.setattr("plait.data.text.train_tokenizer", lambda *args: pytest.fail("trained again"))
    build(tokenizer="bpe", vocab_size=300)
    build(tokenizer="bpe", vocab_size=300, run="second")  # from the shared cache
    path = build(tokenizer=str(tmp_path / "run"), run="third")  # another run's, by its path
    assert path.tokenizer.fingerprint == data.tokenizer.fingerprint
    with pytest.raises(DataError, match="keeps the tokenizer of another run"):
        build(tokenizer="bpe", vocab_size=301)
    with pytest.raises(DataError, match="keeps the tokenizer of another run"):
        build(tokenizer="byte")
    (corpus_folder / "more.txt").write_text("more")
    with pytest.raises(DataError, match="keeps a tokenizer trained on other text"):
        build(tokenizer="bpe", vocab_size=300)


def test_bpe_smaller_than_asked_is_said(build, caplog):
    with caplog.at_level(logging.WARNING, "plait.data"):
        data = build(tokenizer="bpe", vocab_size=50_000)
    assert f"the corpus gives {data.vocab_size} tokens of data.vocab_size=50000" in caplog.text


def test_cache_is_in_the_run_folder_by_default(corpus_folder, tmp_path):
    build_data(DataConfig(source=str(corpus_folder), tokenizer="byte", seq_len=32), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"data", "tokenizer"}


def test_summary_is_json_and_names_its_ids(build):
    data = build()
    found = json.loads(json.dumps(data.summary()))
    assert (found["num_documents"], found["vocab_size"], found["seed"]) == (60, 257, 0)
    assert data.strings([97, 256]) == data.tokenizer.token_strings([97, 256])


def test_closed_iterator_ends(build):
    iterator = build().train()
    next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_sotu_trains_out_of_the_box(tmp_path):
    data = build_data(DataConfig(tokenizer="byte", batch_size=2), tmp_path)
    batch = next(data.train())
    assert batch.tokens.shape == (2, 512)
    assert data.facts["num_bytes"] == 12_185_751
    assert 0.015 < data.facts["num_val_bytes"] / data.facts["num_bytes"] < 0.04


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_the_loss_is_of_the_answers_alone(tokenizer, tmp_path):
    """Every answer counts, its end too, and nothing of a question, where rows are longer than both."""
    records = [{"question": f"How much is {i} and {i}? ", "answer": f"It is {2 * i}!"} for i in range(40)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"vocab_size": 300} if tokenizer == "bpe" else {}
    config = DataConfig(
        source=str(tmp_path / "all.jsonl"),
        text_field="answer",
        prompt_field="question",
        tokenizer=tokenizer,
        seq_len=256,
        batch_size=1,
        val_fraction=0.0,
        **options,
    )
    data = build_data(config, tmp_path / "run")
    row = data.read_train(np.arange(data.facts["num_train_rows"]))
    asked = row.loss_mask > 0
    pieces = [
        data.tokenizer.decode(targets[(segments == number) & mask])
        for targets, segments, mask in zip(row.targets, row.segment_ids, asked)
        for number in range(1, segments.max() + 1)
    ]
    answers = {record["answer"] for record in records}
    whole = answers & set(pieces)
    cut = {piece for piece in pieces if piece} - whole
    assert len(whole) > 25 and len(cut) < data.facts["num_train_rows"]
    assert all(any(answer.startswith(piece) for answer in answers) for piece in cut)  # what a row's edge left of it
    assert abs((row.targets[asked] == data.tokenizer.eos_id).sum() - len(whole)) < data.facts["num_train_rows"]
    again = build_data(config, tmp_path / "run")  # from the cache
    assert_equal([row], [again.read_train(np.arange(data.facts["num_train_rows"]))])


def test_examples_with_prompts_are_held_out_whole(tmp_path):
    records = [{"question": "q" * 50, "answer": "a" * (20 + i)} for i in range(4)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    fields = {"text_field": "answer", "prompt_field": "question", "tokenizer": "byte", "seq_len": 80, "batch_size": 1}
    data = build_data(DataConfig(source=str(tmp_path / "all.jsonl"), val_fraction=0.02, **fields), tmp_path / "run")
    val = data.val[0]
    assert data.facts["num_prompt_tokens"] == 200 and 21 <= val.loss_mask.sum() <= 24
    assert set(val.targets[val.loss_mask > 0]) == {ord("a"), 256}
