"""Every text comes back from its ids, and every id knows its bytes."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from plait.data.config import DataError
from plait.data.tokenizers.bpe import train_bpe
from plait.data.tokenizers.files import load_tokenizer, read_meta
from plait.data.tokenizers.tokenizer import BYTE_CHARS, END_OF_TEXT, ByteTokenizer
from plait.data.tokenizers.tokenizer_json import JsonTokenizer, split_long
from tests.data.conftest import make_texts

TEXTS = [
    "",
    " ",
    "plain",
    "naïve 日本語 🙂‍👩 \u0301",
    "\r\n\ttabs  two\n\n\n",
    f"spells {END_OF_TEXT} out",
    "\x00\x1f\x7f",
    "'tis don't",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(make_texts(50), 300)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "byte" else bpe


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.num_bytes(ids) == len(text.encode())
    assert b"".join(tokenizer.token_bytes(int(i)) for i in ids) == text.encode()
    assert tokenizer.eos_id not in ids  # a text cannot spell a special token


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_inverts_encode_of_any_text(bpe, text):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.num_bytes(ids) == len(text.encode())


def test_encode_batch_equals_encode_one_by_one(tokenizer):
    for one, many in zip([tokenizer.encode(text) for text in TEXTS], tokenizer.encode_batch(TEXTS)):
        np.testing.assert_array_equal(one, many)


def test_special_tokens_have_no_bytes_and_no_text(tokenizer):
    assert tokenizer.bytes_per_token.shape == (tokenizer.vocab_size,)
    assert tokenizer.bytes_per_token[tokenizer.eos_id] == 0
    assert np.sum(tokenizer.bytes_per_token == 0) == 1
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]) == "hi"


def test_token_strings_label_text_specials_and_lone_bytes(tokenizer):
    ids = [*ByteTokenizer().encode("é"), 256]
    assert ByteTokenizer().token_strings(ids) == ["<C3>", "<A9>", END_OF_TEXT]
    text = "the people"
    assert "".join(tokenizer.token_strings(tokenizer.encode(text))) == text
    assert tokenizer.token_strings([tokenizer.eos_id]) == [END_OF_TEXT]


def test_bpe_training_is_deterministic():
    one, two = (train_bpe(make_texts(50), 300) for _ in range(2))
    assert one.text == two.text
    assert one.fingerprint == two.fingerprint != train_bpe(make_texts(50), 299).fingerprint
    assert one.vocab_size == 300


def test_bpe_of_a_small_corpus_has_fewer_tokens_and_257_has_no_merges():
    assert train_bpe(["ab ab"], 4096).vocab_size < 300
    assert len(train_bpe(make_texts(5), 257).encode("people")) == 6
    with pytest.raises(DataError, match=r"data\.vocab_size=100 must be at least 257"):
        train_bpe(["a"], 100)


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "tokenizer", corpus="abc")
    for path in ("run", "run/tokenizer", "run/tokenizer/tokenizer.json"):
        loaded = load_tokenizer(tmp_path / path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.eos_id, loaded.bos_id, loaded.vocab_size) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size)
        np.testing.assert_array_equal(loaded.encode(TEXTS[3]), tokenizer.encode(TEXTS[3]))
    assert read_meta(tmp_path / "run" / "tokenizer").corpus == "abc"


def test_saved_tokenizer_json_means_the_same_to_other_libraries(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:5]:
        assert other.encode(text).ids == tokenizer.encode(text).tolist()
    assert other.token_to_id(END_OF_TEXT) == tokenizer.eos_id


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_split_long_changes_no_token(bpe, limit):
    text = " ".join(make_texts(20)) + "  spaces \n .\n\n x"
    pieces = split_long(text, limit)
    assert "".join(pieces) == text
    assert len(pieces) > 5
    np.testing.assert_array_equal(np.concatenate(bpe.encode_batch(pieces)), bpe.encode(text))


def sentencepiece_like():
    """Byte fallback and a marker for spaces, as in Llama 2."""
    vocab = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{f"<0x{b:02X}>": b + 3 for b in range(256)},
        "▁": 259,
        "h": 260,
        "i": 261,
        "hi": 262,
    }
    tok = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("h", "i")], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tok.add_special_tokens(["<s>", "</s>"])
    return tok


def test_byte_fallback_tokenizer_is_read_and_says_that_its_bytes_are_inexact(tmp_path):
    (tmp_path / "tokenizer.json").write_text(sentencepiece_like().to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (2, 1) and "spaces" in tokenizer.changes
    assert tokenizer.decode(tokenizer.encode("hi hi é")) == "hi hi é"
    assert tokenizer.num_bytes(tokenizer.encode("hi hi é")) == len("hi hi é".encode()) + 1


def test_end_token_comes_from_usual_names_where_nothing_says_it(tmp_path, bpe):
    (tmp_path / "tokenizer.json").write_text(bpe.text)
    assert load_tokenizer(tmp_path).eos_id == bpe.eos_id


def test_unusable_tokenizers_say_why(tmp_path, bpe):
    with pytest.raises(DataError, match=r"is no tokenizer\.json and has none; use byte, bpe, or the path"):
        load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    for text in ("{", "[]", '{"eos": 1, "added_tokens": [{"content": "</s>", "special": true}]}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
            load_tokenizer(tmp_path)
    file.write_text(bpe.text.replace(END_OF_TEXT, "<stop>"))
    with pytest.raises(DataError, match=r"which token ends a text \(special tokens: <stop>\); put"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(DataError, match=r"has no token '<gone>'"):
        load_tokenizer(tmp_path)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(DataError, match="neither byte-level nor has byte fallback"):
        JsonTokenizer(words.to_str(), eos="</s>")


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def spaces_marked(scheme):
    """Byte fallback behind Metaspace, as newer SentencePiece conversions have it."""
    tok = sentencepiece_like()
    tok.normalizer = normalizers.Sequence([])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tok.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=False)])
    return tok


def byte_level_with(bpe, **components):
    tok = tokenizers.Tokenizer.from_str(bpe.text)
    for name, component in components.items():
        setattr(tok, name, component)
    return tok


def isolated(pattern, behavior="isolated"):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), last])


PUBLISHED = {
    "GPT-2": (byte_level_with, ""),
    "Llama 3": (lambda bpe: byte_level_with(bpe, pre_tokenizer=isolated(LLAMA3)), ""),
    "Qwen": (lambda bpe: byte_level_with(bpe, pre_tokenizer=isolated(LLAMA3), normalizer=normalizers.NFC()), "normalizer NFC"),
    "prefix space": (
        lambda bpe: byte_level_with(bpe, pre_tokenizer=pre_tokenizers.ByteLevel()),
        "ByteLevel with add_prefix_space",
    ),
    "lower case": (lambda bpe: byte_level_with(bpe, normalizer=normalizers.Lowercase()), "normalizer Lowercase"),
    "stripped": (lambda bpe: byte_level_with(bpe, normalizer=normalizers.Strip()), "normalizer Strip"),
    "spaces dropped": (lambda bpe: byte_level_with(bpe, pre_tokenizer=isolated(r"\s+", "removed")), "pre-tokenizer Split"),
    "Llama 2": (lambda bpe: sentencepiece_like(), "normalizer Prepend, normalizer Replace, spaces as marks"),
    "Metaspace always": (lambda bpe: spaces_marked("always"), "spaces as marks, pre-tokenizer Metaspace"),
    "Metaspace first": (lambda bpe: spaces_marked("first"), "spaces as marks, pre-tokenizer Metaspace"),
    "Metaspace never": (lambda bpe: spaces_marked("never"), "spaces as marks, pre-tokenizer Metaspace"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_kinds_count_the_bytes_their_tokens_stand_for(name, bpe):
    """Those of what the tokens give back, of the text itself where nothing changes it; a space that was put before it counts."""
    make, changes = PUBLISHED[name]
    tokenizer = JsonTokenizer(make(bpe).to_str(), eos=None)
    assert tokenizer.changes == changes
    for text in ["the law of 1790", " two  spaces ", "naïve e\u0301 日本 🙂", "\r\n\ttabs", "hi hi", "▁mark"]:
        ids = tokenizer.encode(text)
        counted = b"".join(tokenizer.token_bytes(int(i)) for i in ids)
        assert tokenizer.num_bytes(ids) == len(counted)
        if not changes:
            assert counted == text.encode() and tokenizer.decode(ids) == text
        else:
            assert counted.decode().strip(" ") == tokenizer.decode(ids).strip(" ")


def test_long_runs_without_spaces_are_learned_from_in_parts():
    """A whole run as one word would be quadratic: these would take minutes."""
    for text in ("acgt" * 150_000, "日本語" * 60_000, "a" * 600_000):
        tokenizer = train_bpe([text], 400)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) < len(text) / 40


def vocabulary(bpe, **more):
    content = json.loads(bpe.text)
    content["model"]["vocab"] |= more
    return content


def model(bpe, **more):
    content = json.loads(bpe.text)
    content["model"] |= more
    return content


REFUSED = {
    "huge id": (lambda bpe: vocabulary(bpe, far=10**9), r"gives 'far' the id 1000000000; ids must be below 4194304"),
    "two names": (lambda bpe: vocabulary(bpe, other=40), r"gives both .* and .* the id 40; give each token its own"),
    "negative id": (lambda bpe: vocabulary(bpe, less=-1), r"is not a tokenizer\.json"),
    "no number": (lambda bpe: vocabulary(bpe, word="1"), r"is not a tokenizer\.json"),
    "dropout": (lambda bpe: model(bpe, dropout=0.5), r"has dropout=0\.5, so that a text has other tokens each time"),
    "suffix": (lambda bpe: model(bpe, end_of_word_suffix="</w>", merges=[]), r"marks its tokens with end_of_word_suffix='</w>'"),
    "no decoder": (lambda bpe: json.loads(bpe.text) | {"decoder": None}, r"byte-level without the decoder ByteLevel"),
    "a byte missing": (
        lambda bpe: model(bpe, merges=[], vocab={k: v for k, v in json.loads(bpe.text)["model"]["vocab"].items() if k != "a"}),
        r"no token for 1 of the 256 bytes \(0x61 is the first\)",
    ),
    "no added tokens": (lambda bpe: {"added_tokens": None}, r"is not a tokenizer\.json"),
    "added tokens of no kind": (lambda bpe: {"added_tokens": ["a"]}, r"is not a tokenizer\.json"),
    "added token without a name": (lambda bpe: {"added_tokens": [{"id": 0, "special": True}]}, r"is not a tokenizer\.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizer_that_cannot_be_right_is_refused(name, bpe, tmp_path):
    make, message = REFUSED[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(make(bpe)))
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_bytes_without_a_token_are_refused_where_a_text_has_them(bpe):
    """Vocabularies that lack control characters are published."""
    content = vocabulary(bpe)
    del content["model"]["vocab"][BYTE_CHARS[4]]
    tokenizer = JsonTokenizer(json.dumps(content), eos=END_OF_TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]
    with pytest.raises(DataError, match="has no token for the byte 0x04, which a text has at byte 2; take it out there"):
        tokenizer.encode("a \x04")


def test_holes_between_ids_are_tokens_that_nothing_uses(bpe):
    tokenizer = JsonTokenizer(json.dumps(vocabulary(bpe, far=5000)), eos=END_OF_TEXT)
    assert tokenizer.vocab_size == 5001 and tokenizer.decode([4000]) == ""
    assert tokenizer.token_strings([4000]) == ["<unused 4000>"]
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]


def test_text_that_spells_the_end_token_does_not_end(bpe):
    """Also where the file does not call it special."""
    tok = tokenizers.Tokenizer.from_str(bpe.text)
    tok.add_tokens([AddedToken("<stop>", special=False), AddedToken("<é>", special=False)])
    tokenizer = JsonTokenizer(tok.to_str(), eos="<stop>")
    text = "a <stop> b <é>"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == text and tokenizer.num_bytes(ids) == len(text.encode())


def test_changed_tokenizer_of_ours_is_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"add_prefix_space":false', '"add_prefix_space":true'))
    with pytest.raises(DataError, match=r"tokenizer\.json is not what tokenizer_meta\.json beside it describes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token": 3}', '{"eos_token": {"content": []}}'])
def test_damaged_configuration_beside_a_tokenizer_is_named(content, bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.text)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
