"""Every launch file, written once."""

import pytest

from plait.tests.train.pods.launch_files.cases import write_all


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The folder with the file of every case."""
    return write_all(tmp_path_factory.mktemp("launch_files"))
