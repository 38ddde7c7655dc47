"""Masked language modelling hides what it says, and no model that sees it may be asked for what follows."""

import json

import numpy as np
import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.data.config import DataConfig
from plait.data.loader import build_data
from plait.data.tasks.mlm import MaskedLanguageTask
from plait.data.tasks.ppl import PerplexityTask
from tests.data.conftest import make_texts

MASK, START = 257, 256  # beside the bytes and the one special token


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows by task: hidden and plain ones, of the same text."""
    folder = tmp_path_factory.mktemp("mlm")
    (folder / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_texts(60)), "utf-8")

    def build(task):
        config = DataConfig(
            task=task, source=str(folder / "all.jsonl"), cache_dir=str(folder), tokenizer="byte", seq_len=256, val_fraction=0.2
        )
        return build_data(config, folder / "run")

    return build


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_chosen_tokens_are_hidden_in_the_published_shares(rows, share):
    data, plain = rows(MaskedLanguageTask(mask_share=share)), rows(PerplexityTask())
    index = np.arange(200)
    hidden, text = data.read_train(index), plain.read_train(index)
    chosen = hidden.loss_mask > 0
    np.testing.assert_array_equal(hidden.tokens[~chosen], text.tokens[~chosen])
    np.testing.assert_array_equal(hidden.targets[chosen], text.tokens[chosen])
    real = text.segment_ids > 0
    assert chosen[real].mean() == pytest.approx(share, rel=0.05)
    assert not chosen[~real].any()
    shown = hidden.tokens[chosen]
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (shown == hidden.targets[chosen]).mean() == pytest.approx(0.1, abs=0.02)


def test_a_documents_start_is_never_asked_for(rows):
    index = np.arange(50)
    starts = rows(PerplexityTask()).read_train(index).tokens == START
    assert starts.any()
    assert not rows(MaskedLanguageTask(mask_share=0.9)).read_train(index).loss_mask[starts].any()


def test_the_mask_is_one_id_more(rows):
    assert rows(MaskedLanguageTask()).vocab_size == rows(PerplexityTask()).vocab_size + 1 == MASK + 1


def test_what_follows_is_not_asked_of_a_model_that_sees_it():
    with pytest.raises(ValueError, match=r"model.causal=False lets a token see what data.task=ppl asks of it; use data.task=mlm"):
        parse_experiment("lm_tiny", ["--model.pattern", "softmax", "--model.no-causal"])
