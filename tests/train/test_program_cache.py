"""Where compiled programs are kept, and what of them."""

import os
import time

import jax
import pytest

from plait.tests.train.common import program_of, tiny
from plait.train import program_cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of the user's with none named to JAX."""
    monkeypatch.delenv(program_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    return tmp_path


def test_the_usual_folder_is_named_and_forgets_what_is_old(home):
    program_cache.usual().mkdir(parents=True)
    old, new = (program_cache.usual() / name for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"a program")
    long_ago = time.time() - (program_cache.KEPT_DAYS + 1) * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    program_cache.keep_programs()
    assert os.environ[program_cache.VARIABLE].startswith(str(home)) and program_cache.is_usual()
    assert new.exists() and not old.exists()
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0.5", "what the user says stays"


def test_a_users_folder_is_left_alone(home, monkeypatch):
    monkeypatch.setenv(program_cache.VARIABLE, str(home / "mine"))
    program_cache.keep_programs()
    assert os.environ[program_cache.VARIABLE] == str(home / "mine") and not program_cache.is_usual()
    assert not list(home.iterdir())


def test_without_a_place_nothing_is_kept(home):
    (home / "plait").write_text("a file where the folder would be")
    program_cache.keep_programs()
    assert program_cache.VARIABLE not in os.environ and not program_cache.is_usual()


def test_a_seed_is_no_part_of_a_program():
    one, other = (program_of(tiny({"seed": seed})) for seed in (0, 2**32 - 1))
    assert one.lower_fresh().as_text() == other.lower_fresh().as_text()
    assert one.lower().as_text() == other.lower().as_text()
    a, b = jax.tree.leaves(one.fresh().params), jax.tree.leaves(other.fresh().params)
    assert any((x != y).any() for x, y in zip(a, b, strict=True))
