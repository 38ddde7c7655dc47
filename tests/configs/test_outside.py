"""Components outside the package: files, folders and entry points."""

import importlib.metadata
import sys

import pytest

from plait.configs import outside
from plait.data.tasks.base import TASKS

TASK = '''
import dataclasses
from plait.data.tasks.base import TASKS
from plait.data.tasks.mqar import MQARTask

@TASKS.register("NAME", source="this test")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(MQARTask):
    """Recall under another name."""
'''


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Sets the variable, or the entry points, and has the registry look again; what was found is forgotten."""
    before, path, modules = set(TASKS.all()), list(sys.path), set(sys.modules)

    def look(*named, points=()):
        monkeypatch.setenv(outside.VARIABLE, ":".join(map(str, named)))
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == outside.GROUP else ())
        monkeypatch.setattr(TASKS, "_searched", ())
        return set(TASKS.all()) - before

    yield look
    for name in set(TASKS._known) - before:
        TASKS.forget(name)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("plait_test_"):
            del sys.modules[name]


def write(folder, name, task):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(TASK.replace("NAME", task))
    return folder / f"{name}.py"


def test_files_folders_and_installed_packages_are_found(search, tmp_path):
    file = write(tmp_path / "one", "plait_test_a", "recall_a")
    folder = write(tmp_path / "a folder", "plait_test_b", "recall_b").parent
    write(tmp_path / "site", "plait_test_c", "recall_c")
    sys.path.append(str(tmp_path / "site"))
    point = importlib.metadata.EntryPoint("mine", "plait_test_c", outside.GROUP)
    assert search(file, folder, points=[point]) == {"recall_a", "recall_b", "recall_c"}
    assert TASKS["recall_b"]().source == "this test"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda at: at / "no.py", r"PLAIT_COMPONENTS names '.*no\.py', which is not there"),
        (lambda at: write(at, "plait-test", "x"), "plait-test.py', which is no module; use a name such as my_mixer.py"),
        (lambda at: write(at, "json", "x"), r"json\.py has the name of another module, .*; rename it"),
    ],
    ids=["missing", "no name", "a name that is taken"],
)
def test_what_cannot_be_imported_is_said(search, tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        search(make(tmp_path / "x"))


def test_an_error_in_a_file_is_said(search, tmp_path):
    file = write(tmp_path, "plait_test_bad", "x")
    file.write_text("import plait_no_such_module")
    with pytest.raises(ValueError, match=r"PLAIT_COMPONENTS: .*plait_test_bad\.py cannot be imported \(ModuleNotFoundError"):
        search(file)


def test_a_linked_folder_of_the_package_is_found(search, tmp_path, monkeypatch):
    import plait.data.tasks

    write(tmp_path / "elsewhere", "plait_test_linked", "recall_linked")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mine").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(plait.data.tasks, "__path__", [*plait.data.tasks.__path__, str(tmp_path / "more")])
    assert search() == {"recall_linked"}
