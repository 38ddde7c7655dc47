"""Published configs are read, and have the parameters that they are known to have."""

import json

import pytest

from plait.models.lm import num_params
from plait.tests.train.convert.published import PUBLISHED
from plait.train.convert.fitting import Source


@pytest.mark.parametrize(("fields", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_it_is_read_and_has_its_parameters(fields, parameters, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert num_params(Source.of(tmp_path).model) == parameters


def test_layers_of_gemma_4_share_keys_and_values_and_stay_what_they_are(tmp_path):
    """The last of each kind before the readers is what they read."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-4-E2B"][0]))
    model = Source.of(tmp_path).model
    window, whole = "softmax/window", "softmax"
    own = [*[window] * 4, whole] * 2 + [*[window] * 3, "softmax/window_write", "softmax/write"]
    assert model.layers == (*own, *[*["softmax/window_read"] * 4, "softmax/read"] * 4)
    assert [model.channel_mixer_of(name).hidden_dim for name in model.layers] == [6144] * 15 + [12288] * 20


def test_older_windows_are_those_of_the_family(tmp_path):
    """Gemma 3 by its pattern and its bases of rotary embeddings."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-3-1b-pt"][0]))
    mixers = Source.of(tmp_path).model.layer_mixers
    assert [mixer.window_size for mixer in mixers[:7]] == [512] * 5 + [None, 512]
    assert [mixer.positions.theta for mixer in mixers[4:7]] == [10_000, 1_000_000, 10_000]
