"""Tasks that hide sentences in text, against a reader of their rows that knows the published sentences alone."""

import re

import numpy as np
import pytest

from plait.data.config import DataConfig, DataError
from plait.data.loader import build_data
from plait.data.tasks.common_words import CommonWordsTask
from plait.data.tasks.draws import Draws
from plait.data.tasks.frequent_words import FrequentWordsTask
from plait.data.tasks.generated import NOT_ASKED
from plait.data.tasks.needle import FILLER
from plait.data.tasks.needles import NeedlesTask
from plait.data.tasks.variable_tracking import VariableTrackingTask

TEXT = b"one two three four five six seven eight nine ten " * 9 + b"end."


def rows_of(task, seq_len, text=None, count=24):
    """Each row as its text with the last answer, and its answers by the places where they are asked for."""
    more = {} if text is None else {"text": text}
    tokens, targets = task.generate(Draws(np.arange(count), "test"), seq_len, **more)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        places = [at for at, target in enumerate(asked) if target != NOT_ASKED]
        said = bytes([*row[: places[-1] + 1], asked[places[-1]]])
        assert all(said[at + 1] == asked[at] for at in places), "what is asked for is what comes next"
        assert not any(row[places[-1] + 1 :])
        pieces = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        yield said.decode(), [bytes(asked[at] for at in piece).decode() for piece in pieces]


@pytest.mark.parametrize(
    ("fields", "seq_len"),
    [({}, 512), ({"num_keys": 4, "num_values": 2, "num_queries": 3}, 1100), ({"filler": 60, "depth": 0.5}, 600)],
)
def test_needles_are_read_off_the_text(fields, seq_len):
    task = NeedlesTask(**fields)
    for said, answers in rows_of(task, seq_len, TEXT):
        one = len(answers) == 1
        opening, *lines, question = said.split("\n")
        body = "\n".join(lines)
        told = re.findall(r" One of the special magic numbers for ([a-z]{6}) is: ([1-9]\d{6})\.", body)
        assert len(told) == task.num_keys * task.num_values and len({value for _, value in told}) == len(told)
        assert opening.startswith("A special magic number is hidden" if one else "Some special magic numbers are hidden")
        names = re.search(r"for ([a-z, ]+) mentioned in the provided text\?", question)[1].replace("and ", "").split(", ")
        assert len(names) == task.num_queries and answers == [value for name in names for key, value in told if key == name]
        assert question.endswith(("text is " if one else "text are ") + ", ".join(answers))
        passage = re.sub(r" One of the special magic numbers for [a-z]{6} is: \d{7}\.", "", body)
        assert passage in (TEXT * 3).decode() and (len(said) == seq_len + 1) == (task.filler is None)
        if task.depth is not None:
            assert len(passage) == task.filler
            before = body.split(f" One of the special magic numbers for {names[0]}")[0]
            hidden = len(" One of the special magic numbers for abcdef is: 1234567.")
            assert abs(len(before) % hidden - 30) < 10 or abs(len(before) - 30) < 10


def test_needles_by_depth(tmp_path):
    """Needles of the first half are told, one of them but for its last digit."""
    task = NeedlesTask(num_keys=3, num_queries=3)
    data = DataConfig(task=NeedlesTask(num_keys=3, num_queries=3, haystack="repeat", val_rows=40), seq_len=1024, batch_size=40)
    batch = build_data(data, tmp_path).val[0]
    right, want = np.zeros(batch.tokens.shape, bool), {}
    for row in range(40):
        text = bytes(batch.tokens[row].tolist()).decode()
        body = text[text.index("\n") : text.rindex("\n")]
        places = np.flatnonzero(batch.loss_mask[row]).reshape(3, 7)
        for place in places:
            depth = 10 * body.index(": " + bytes(batch.targets[row, place].tolist()).decode()) // len(body)
            told = depth < 5 and not (row == 0 and place is places[0])
            right[row, place] = told
            right[row, place[:-1]] = depth < 5
            found, all_ = want.get(depth, (0, 0))
            want[depth] = (found + told, all_ + 1)
    scores = task.scores(batch, np.zeros(right.shape), right)
    assert {name: value for name, value in scores.items() if "_at_" in name} == {
        f"found_at_{10 * depth:02d}_to_{10 * depth + 10}": value for depth, value in want.items()
    }
    assert scores["found"] == (sum(found for found, _ in want.values()), 120) and 3 < len(want) <= 10


@pytest.mark.parametrize(("fields", "seq_len"), [({}, 512), ({"num_chains": 3, "num_hops": 2}, 640)])
def test_variables_are_tracked_by_following_assignments(fields, seq_len):
    task = VariableTrackingTask(**fields)
    for said, answers in rows_of(task, seq_len):
        body, question = said.rsplit("\n", 1)
        pairs = re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))", body)
        assert len(pairs) == task.num_chains * (task.num_hops + 1)
        value_of, asked = {}, re.search(r"the value (\d{5}) in the text above", question)[1]
        for name, other, value in pairs:  # in the order of the text: what is assigned has been before
            value_of[name] = value or value_of[other]
        assert [name for name, value in value_of.items() if value == asked] == answers
        assert len(set(value_of.values())) == task.num_chains and question.endswith(f"they are: {', '.join(answers)}")
        assert re.sub(r" VAR [A-Z]{5} = (VAR [A-Z]{5}|\d{5})", "", body).split("\n\n")[1] in FILLER * 20


@pytest.mark.parametrize(("fields", "seq_len"), [({}, 512), ({"num_answers": 2, "word_length": 5}, 1024), ({"alpha": 1.5}, 4096)])
def test_words_come_as_often_as_the_law_of_ranks_says(fields, seq_len):
    task = FrequentWordsTask(**fields)
    orders = set()
    for said, answers in rows_of(task, seq_len, count=8):
        listed = said.split("coded words. ")[1].split("\n")[0].split(" ")
        found = [*sorted((listed.count(word), word) for word in set(listed))[::-1], (0, "")]
        assert found[0][1] == "..." and [word for _, word in found[1 : len(answers) + 1]] == answers
        assert found[len(answers)][0] > found[len(answers) + 1][0], "the last is told from the next"
        zeta = {2.0: np.pi**2 / 6, 1.5: 2.612375348685488}[task.alpha]
        laws = [[int(n * k**-task.alpha / zeta) for k in range(1, len(found) + 1)] for n in range(len(listed), 3 * len(listed))]
        assert [count for count, _ in found] in laws
        assert seq_len + 1 - task.word_length * 3 < len(said) <= seq_len + 1
        orders.add(tuple(word == answers[0] for word in listed))
    assert len(orders) == 8


PUBLISHED = {"num_answers": 10, "frequency": 30, "other_frequency": 3}


@pytest.mark.parametrize(("fields", "seq_len"), [({}, 512), ({"frequency": 9, "other_frequency": 8}, 1024), (PUBLISHED, 8192)])
def test_common_words_come_more_often_than_others(fields, seq_len):
    task = CommonWordsTask(**fields)
    for said, answers in rows_of(task, seq_len, count=8):
        line = said.split("most often.\n")[1].split("\n")[0]
        numbers, words = zip(*re.findall(r"(\d+)\. ([a-z]{6})(?: |$)", line))
        assert [int(number) for number in numbers] == list(range(1, len(words) + 1))
        counts = {word: words.count(word) for word in dict.fromkeys(words)}  # in the order in which they come
        assert [word for word, count in counts.items() if count == task.frequency] == answers
        assert {count for word, count in counts.items() if word not in answers} == {task.other_frequency}
        assert said.endswith("the list are: " + " ".join(f"{k + 1}. {word}" for k, word in enumerate(answers)))
        assert seq_len + 1 - (task.word_length + 6) * task.other_frequency < len(said) <= seq_len + 1


def test_passages_are_of_the_text_of_the_source(tmp_path):
    (tmp_path / "a.txt").write_text("aa bb cc dd " * 40)
    fields = {"seq_len": 512, "batch_size": 4, "source": str(tmp_path / "a.txt")}
    data = build_data(DataConfig(task=NeedlesTask(), **fields), tmp_path)
    assert all(re.search("(aa|bb|cc|dd) ", bytes(row.tolist()).decode()) for row in data.read_train(np.arange(4)).tokens)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    (tmp_path / "b.txt").write_text("aa bb cc ee " * 40)
    other = build_data(DataConfig(task=NeedlesTask(), **{**fields, "source": str(tmp_path / "b.txt")}), tmp_path)
    assert data.identity["haystack"] != other.identity["haystack"]
    (tmp_path / "shards" / "tokenizer").mkdir(parents=True)
    (tmp_path / "shards" / "shard-0").touch()
    with pytest.raises(
        DataError, match=r"holds tokens and no text to hide sentences in; give text, or use data\.task\.haystack=repeat"
    ):
        build_data(DataConfig(task=NeedlesTask(), **{**fields, "source": str(tmp_path / "shards")}), tmp_path)


@pytest.mark.parametrize(
    ("task", "seq_len", "message"),
    [
        (lambda: NeedlesTask(num_queries=3), 512, r"needles\.num_queries=3 must be at most num_keys=2"),
        (lambda: NeedlesTask(filler=400), 512, r"filler=400 needs rows of at least 798 tokens, 398 .*=512; use 114 or less, or .*=798"),
        (VariableTrackingTask, 128, r"data\.task\.filler=None needs rows of at least 4\d\d tokens, .*; use data\.seq_len=4\d\d or more"),
        (lambda: CommonWordsTask(frequency=2, other_frequency=2), 512, r"frequency=2 must be above other_frequency=2.*; use 3 or more"),
        (lambda: CommonWordsTask(**PUBLISHED), 2048, r"frequency=30 of num_answers=10 words .* least 3884 tokens, .*; use a smaller one, or "),
        (lambda: FrequentWordsTask(num_answers=4), 512, r"num_answers=4 words cannot be told apart .*=512; use fewer, or data\.seq_len=1024"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(task, seq_len, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(task=task(), seq_len=seq_len)
