"""What `eval --lm-eval` refuses, before anything is compiled or written, and how chats are found."""

import importlib.util
import json

import pytest

from plait.data.tasks.base import TASKS
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.launch import main
from plait.tests.train.common import program_of, tiny
from plait.train.harness.asking import Asked, AskOptions
from plait.train.harness.chat import Chat, template_of
from plait.train.run import Trained

TEMPLATE = "{% for one in messages %}<{{ one.role }}>{{ one.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def without(monkeypatch):
    """No package lm-eval."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "lm_eval='piqa' needs the package lm-eval, which is not installed; pip install 'plait[eval]'"),
        (["--tasks", "ppl"], "'--tasks' is not an option of 'launch.py eval RUN --lm-eval TASK'"),
        (["--limit", "0"], "limit=0 must be a whole number from 1"),
        (["--include-path", "nowhere"], "include_path='nowhere' is no folder that is there; give one"),
        (["--chat", "--chat-template", "nowhere"], "chat_template='nowhere' is no file that is there; give one"),
        (["--chat-template", "template"], "chat_template='template' is the template of a chat; add --chat, or leave it out"),
        (["--out", "."], "out='.' is a folder; give a file"),
        (["--samples", "."], "samples='.' is a folder; give a file"),
        (["--samples", "template"], "samples='template' is there already, and would be lost"),
    ],
)
def test_bad_words_are_refused(words, message, without, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template").write_text(TEMPLATE)
    assert main(["eval", "run", "--lm-eval", "piqa", *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["template"]


def test_no_names_are_refused(without, capsys):
    assert main(["eval", "run", "--lm-eval", ","]) == 2
    assert "lm_eval=',' must name tasks" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, of the extra eval")
def test_tasks_that_are_not_there_or_cannot_be_read_are_refused(tmp_path, monkeypatch, capsys):
    """Before the run is looked for."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.yaml").write_text(
        "task: own_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
    )
    command = ["eval", str(tmp_path / "run"), "--include-path", str(tmp_path), "--lm-eval"]
    assert main([*command, "own_tsk"]) == 2
    assert "'own_tsk' is no task of lm-eval" in (said := capsys.readouterr().err) and "did you mean 'own_task'" in said
    assert main([*command, "own_task"]) == 2
    assert "--lm-eval own_task cannot be loaded: FileNotFoundError" in capsys.readouterr().err


def trained(tokenizer=None, **changes) -> Trained:
    return Trained(program_of(tiny(changes), 257), tokenizer, 0, {}, {}, {})


def test_runs_that_cannot_be_asked_are_refused():
    with pytest.raises(ValueError, match="whose tokens are no text; give a run that was trained on text"):
        Asked(trained(), AskOptions())
    both = {"model.causal": False, "data.task": TASKS["mlm"]()}
    with pytest.raises(ValueError, match=r"model\.causal=False, and sees what it is asked for"):
        Asked(trained(ByteTokenizer(), **both), AskOptions())


def test_texts_begin_as_the_run_was_trained_or_as_published(tmp_path):
    """A word on the command line comes first."""
    asked = lambda **options: Asked(trained(ByteTokenizer(), out=str(tmp_path)), AskOptions(**options)).texts.document_start
    assert asked() and not asked(document_start=False)
    published = tmp_path / "published"
    published.mkdir()
    assert not asked(), "the tokenizer adds none"
    for said in (True, False):
        (published / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": said}))
        assert asked() == said


def test_template_is_that_of_the_published_files(tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    with pytest.raises(
        ValueError, match=r"has no chat template in published/chat_template\.jinja; give one with --chat-template FILE"
    ):
        template_of(tmp_path)
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "named"}]
    for said in ("plain", several):
        (published / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
        assert template_of(tmp_path) == (said if isinstance(said, str) else "named")
    (published / "chat_template.jinja").write_text("file")
    assert template_of(tmp_path) == "file"


def test_chats_are_rendered():
    pytest.importorskip("jinja2", reason="needs jinja2, of the extra test")
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " so "}]
    chat = Chat(TEMPLATE, ByteTokenizer())
    assert chat(said[:1]) == "<user>hi</><assistant>"
    assert chat(said, goes_on=False) == "<user>hi</><assistant> so", "goes on within the last message"
    marked = Chat("{% generation %}\n{{ bos_token }}{{ messages | tojson }}{% endgeneration %}\n", ByteTokenizer())
    assert marked([{"role": "user", "content": "é"}]) == '<|endoftext|>[{"role": "user", "content": "é"}]'
    with pytest.raises(ValueError, match="chat_template is no Jinja template"):
        Chat("{% if %}", ByteTokenizer())
    with pytest.raises(ValueError, match=r"chat_template refuses the messages \(never\)"):
        Chat("{{ raise_exception('never') }}", ByteTokenizer())(said)
    with pytest.raises(ValueError, match=r"chat_template refuses the messages .*unsafe"):
        Chat("{{ messages.__class__.__mro__ }}", ByteTokenizer())(said)
