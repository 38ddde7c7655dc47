"""One folder of compiled programs for a session, and a small corpus."""

from pathlib import Path

import jax
import pytest

from plait.tests.train.common import write_corpus


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """A folder in which this process and those it starts keep compiled programs, so that equal ones compile once."""
    folder = tmp_path_factory.mktemp("compiled")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of four .txt documents."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
