"""Vocabularies that are settled without the data."""

import dataclasses

import pytest

from plait.configs.presets import preset
from plait.configs.vocabulary import with_vocabulary


@pytest.mark.parametrize(
    ("tokenizer", "trained", "model", "elsewhere", "expected"),
    [
        ("byte", None, None, None, 384),
        ("byte", None, 512, None, 512),
        ("bpe", None, None, None, 4096),
        ("bpe", 1000, None, 99, 1024),
        ("runs/a", None, 1000, 9999, 1000),
        ("runs/a", None, None, 99, 128),
    ],
)
def test_size(tokenizer, trained, model, elsewhere, expected):
    assert with_vocabulary(_config(tokenizer, trained, model), elsewhere).model.vocab_size == expected


def test_size_that_only_a_file_says():
    with pytest.raises(ValueError, match=r"model.vocab_size=None is not known from data.tokenizer='runs/a'"):
        with_vocabulary(_config("runs/a", None, None))


def test_size_below_the_tokenizers():
    with pytest.raises(ValueError, match=r"model.vocab_size=256 is smaller than the data's 257"):
        with_vocabulary(_config("byte", None, 256))


def _config(tokenizer, trained, model):
    config = preset("lm_tiny")
    data = dataclasses.replace(config.data, tokenizer=tokenizer, vocab_size=trained)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, vocab_size=model))
