"""The registry of a kind of component, and the base of all configs."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest

from plait.configs.components import (
    Component,
    Config,
    ConfigError,
    Registry,
    children,
    registries,
    registry_of,
    unchecked,
    validate,
)
from plait.models.channel_mixers.base import CHANNEL_MIXERS
from plait.models.mixers.base import MIXERS, MixerConfig
from plait.tests.configs.gadgets.base import GADGETS, GadgetConfig
from plait.tests.configs.gadgets.deeper.winch import LEVER, WinchConfig
from plait.tests.configs.gadgets.lever import LeverConfig, LongLeverConfig

FILE = """
import dataclasses
from plait.configs.components import Component, registries

@registries["tool"].register({name!r}, source="here")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool(Component):
    pass
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A registry over an empty package; `tools.write("a/b.py", name)` adds a stranger's file to it."""
    folder = tmp_path / "plait_tools"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("tool", "plait_tools", Component)

    def write(file, name=None, text=None):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(FILE.format(name=name) if text is None else text)
        importlib.invalidate_caches()

    registry.write = write
    yield registry
    registries.pop("tool")
    for name in [name for name in sys.modules if name.split(".")[0] == "plait_tools"]:
        del sys.modules[name]


def test_files_are_found_by_themselves_in_any_folder(tools):
    tools.write("saw.py", "saw")
    tools.write("new/folder/axe.py", "axe")
    tools.write("new/not-a-module.py", text="raise RuntimeError")
    assert list(tools.all()) == ["axe", "saw"], "sorted"
    assert "axe" in tools and "hammer" not in tools
    assert tools["axe"].name == "axe" and tools["axe"].source == "here" and tools["axe"].kind_of_component == "tool"
    tools.forget("axe")
    assert list(tools.all()) == ["saw"], "a file is imported once"


def test_a_name_in_two_files_names_both(tools):
    tools.write("saw.py", "saw")
    tools.write("other/saw_again.py", "saw")
    with pytest.raises(
        ValueError, match=r"tool 'saw' is registered twice, in plait_tools.* and plait_tools.*; rename one of them"
    ) as error:
        tools.all()
    assert "plait_tools.saw" in str(error.value) and "plait_tools.other.saw_again" in str(error.value)


def test_a_module_that_is_loaded_again_replaces_its_own(tools):
    tools.write("saw.py", "saw")
    old = tools["saw"]
    importlib.reload(sys.modules["plait_tools.saw"])
    assert tools["saw"] is not old and not tools.holds(old)


def test_what_an_import_raises_is_not_swallowed(tools):
    tools.write("broken.py", text="import plait_no_such_module")
    with pytest.raises(ConfigError, match=r"/broken\.py cannot be imported \(ModuleNotFoundError: .*plait_no_such_module"):
        tools.all()


def test_unknown_name_gives_the_nearest_or_all():
    with pytest.raises(ValueError, match=r"gadget 'levr' is not registered; did you mean 'lever'.*`launch.py list gadgets`"):
        GADGETS["levr"]
    with pytest.raises(ValueError, match="gadget 'zzz' is not registered; there are lever, long_lever, winch"):
        GADGETS["zzz"]


def test_words_of_a_kind():
    assert CHANNEL_MIXERS.tag == "channel_mixer_name" and CHANNEL_MIXERS.plural == "channel-mixers"


def test_a_class_that_inherits_from_a_component_is_none():
    class Longer(LeverConfig):
        pass

    assert GADGETS.holds(LeverConfig) and GADGETS.holds(LongLeverConfig) and not GADGETS.holds(Longer)
    assert not GADGETS.holds(GadgetConfig)


def test_registry_of_a_class():
    assert registry_of(MixerConfig) is MIXERS
    assert registry_of(GadgetConfig) is registry_of(LeverConfig) is GADGETS
    assert registry_of(Holder) is None


def test_children_are_told_with_their_paths():
    lever, long = LeverConfig(), LongLeverConfig()
    winch = WinchConfig(main=lever, exact=long, parts=(lever, long), named={"a": long})
    assert list(children(winch)) == [("main", lever), ("exact", long), ("parts.0", lever), ("parts.1", long), ("named.a", long)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder(Config):
    """Checks itself and completes itself."""

    path = "holder"
    gadget: GadgetConfig = LEVER
    limit: int = 5
    double: int | None = None

    def complete(self):
        if self.limit > 100:
            raise ValueError(f"limit={self.limit} cannot be doubled; use at most 100")
        object.__setattr__(self, "double", 2 * self.limit)

    def check(self):
        if self.gadget.size > self.limit:
            raise ValueError(f"limit={self.limit} is below gadget.size={self.gadget.size}; raise it")


def test_a_config_is_completed_and_checked_where_it_is_made():
    assert Holder().double == 10
    with pytest.raises(ConfigError, match=r"^lever\.size=0 must be at least 1"):
        LeverConfig(size=0)
    with pytest.raises(ConfigError, match=r"^holder\.limit=101 cannot be doubled"):
        Holder(limit=101)


def test_unchecked_configs_are_checked_as_a_whole_by_their_paths():
    with unchecked():
        inner = WinchConfig(parts=(LeverConfig(), WinchConfig(named={"a/b": LeverConfig(size=0)})))
        small, wrong = Holder(gadget=LeverConfig(size=7)), Holder(limit=101)
    with pytest.raises(ConfigError, match=r"^top\.parts\.1\.named\.a/b\.size=0 must be at least 1; use a positive number$"):
        validate(inner, "top")
    with pytest.raises(ConfigError, match=r"^limit=5 is below gadget\.size=7; raise it$"):
        validate(small)
    with pytest.raises(ConfigError, match=r"^here\.limit=101 cannot be doubled"):
        validate(wrong, "here")
    with pytest.raises(ConfigError):
        LeverConfig(size=0)  # checked again behind the block


def test_unchecked_ends_with_an_error_in_the_block():
    with pytest.raises(KeyError), unchecked():
        raise KeyError
    with pytest.raises(ConfigError):
        LeverConfig(size=0)


def test_a_class_of_another_kind_is_refused(tools):
    with pytest.raises(ValueError, match="registers MLPConfig as the tool 'mlp'; it must be a Saw"):
        tools.base = type("Saw", (Component,), {})
        tools.register("mlp", source="here")(type("MLPConfig", (Component,), {}))
