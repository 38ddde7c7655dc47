"""Texts as tokens: where a context ends and what follows begins, windows over a long text, and the end of an answer."""

import importlib.util
import random

import pytest

from plait.data.tokenizers.bpe import train_bpe
from plait.data.tokenizers.tokenizer import END_OF_TEXT, ByteTokenizer
from plait.tests.data.conftest import make_texts
from plait.train.harness.answers import Wanted
from plait.train.harness.texts import Ends, Texts

END = ByteTokenizer.eos_id


def texts_of(**more) -> Texts:
    return Texts(**{"tokenizer": ByteTokenizer(), "document_start": False, **more})


@pytest.mark.parametrize(
    ("context", "continuation", "given", "follows"),
    [
        ("ab", " c", "ab", " c"),
        ("ab ", "c", "ab", " c"),  # the space is of what follows
        ("ab\n \t", "c", "ab", "\n \tc"),
        ("", "c", [END], "c"),
        (" ", "c", [END], " c"),
    ],
)
@pytest.mark.parametrize("start", [False, True])
def test_where_a_pair_is_cut(context, continuation, given, follows, start):
    pair = texts_of(document_start=start).pair(context, continuation)
    begins = [END] * (start and given != [END])
    assert pair == (given if given == [END] else [*begins, *given.encode()], list(follows.encode()))


def test_what_joins_the_context_still_follows():
    """A tokenizer that joins the last token of the context to what follows leaves nothing of it: then it is read alone."""
    tokenizer = train_bpe(["ababab ab" * 50], 300)
    texts = texts_of(tokenizer=tokenizer)
    assert len(tokenizer.encode("aba")) >= len(tokenizer.encode("abab"))
    given, follows = texts.pair("aba", "b")
    assert given == tokenizer.encode("aba").tolist() and follows == tokenizer.encode("b").tolist()


def test_special_tokens_are_plain_text_but_in_chats():
    plain, chats = texts_of(document_start=True), texts_of(document_start=True, special=True)
    text = f"{END_OF_TEXT}hi{END_OF_TEXT}"
    assert plain.ids(text) == [END, *text.encode()]
    assert chats.ids(text) == [END, *b"hi", END], "begins with the start token already"
    assert chats.ids("hi") == [END, *b"hi"]
    bpe = train_bpe(make_texts(20), 280)
    assert texts_of(tokenizer=bpe, special=True).ids(text) == [bpe.eos_id, *bpe.encode("hi").tolist(), bpe.eos_id]
    assert texts_of().prompt("") == [END]


def test_windows_of_the_published_example():
    """That of lm-evaluation-harness's `loglikelihood_rolling`: ten tokens, four read at once."""
    text = bytes(range(10)).decode()
    assert list(texts_of().windows(text, 4)) == [
        ([END], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert list(texts_of().windows("", 4)) == []


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, of the extra eval")
def test_windows_are_the_harness_s():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    rng = random.Random(0)
    for length in range(1, 40):
        longest, text = rng.randint(1, 12), bytes(rng.randint(0, 127) for _ in range(length)).decode()
        theirs = map(make_disjoint_window, get_rolling_token_windows(list(text.encode()), END, longest, 1))
        assert list(texts_of().windows(text, longest)) == list(theirs), (length, longest)


def test_answers_end_at_a_text_or_a_token():
    tokenizer = ByteTokenizer()
    ends = Ends.of(tokenizer, ["\n", "stop", "", END_OF_TEXT], more=[7])
    assert ends.texts == ("\n", "stop") and ends.tokens == {END, 7}
    for said, text in (("one stop two\n", "one "), ("one\nstop", "one"), (f"a{chr(7)}b", "a"), ("sto", "sto")):
        assert ends.cut(tokenizer, list(said.encode())) == (text, text != said)
    assert ends.cut(tokenizer, [*b"a", END, *b"b"]) == ("a", True)


@pytest.mark.parametrize(
    ("options", "temperature", "num_tokens"),
    [
        ({}, 0, 256),
        ({"do_sample": False, "temperature": 0.7, "max_new_tokens": 5}, 0, 5),
        ({"do_sample": True, "max_gen_toks": 5, "max_tokens": 9}, 1, 5),
        ({"temperature": 0.7, "top_p": 0.9, "num_beams": 1}, 0.7, 256),
    ],
)
def test_options_of_answers(options, temperature, num_tokens):
    found = Wanted.of({"until": "\n", **options})
    assert found.until == ("\n",) and found.sampling.temperature == temperature and found.num_tokens == num_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs.num_beams=4 is nothing that is done here; use until"),
        ({"repetition_penalty": 1.2}, "generation_kwargs.repetition_penalty=1.2 is nothing that is done here"),
        ({"max_gen_toks": 0}, "generation_kwargs.max_gen_toks=0 must be a whole number from 1"),
        ({"until": [3]}, r"generation_kwargs.until=\(3,\) must be texts"),
        ({"temperature": -1.0}, "generation_kwargs.temperature=-1.0 must be"),
    ],
)
def test_options_that_nothing_does_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Wanted.of(options)


def test_text_that_is_none_is_refused():
    with pytest.raises(ValueError, match="is not UTF-8; give text"):
        texts_of().ids("\ud800")
    with pytest.raises(ValueError, match="continuation='' has no token to be scored"):
        texts_of().pair("a", "")
