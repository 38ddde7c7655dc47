"""Statistics of layers to arrays of one shape, and to the few scalars of a metrics line."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.tests.train.common import hybrid, tiny
from plait.train.probes.base import chosen
from plait.train.probes.collect import describe_layers, padded_layers, probe_arrays, probe_metrics
from plait.train.report.run import KINDS
from plait.train.report.style import KIND_COLOURS

NAN = np.nan


def statistics():
    """A recurrent layer of two heads and a softmax layer of three."""
    return [
        {
            "entropy": jnp.array([1.0, 3.0]),
            "sink": jnp.ones((2, 4)),
            "sink_rate": jnp.zeros(2),
            "decay_horizon": jnp.array([8.0, 2.0]),
        },
        {
            "entropy": jnp.array([2.0, 4.0, 5.0]),
            "sink": jnp.zeros((3, 4)),
            "sink_rate": jnp.array([1.0, 0.0, 1.0]),
            "max_logit": jnp.array([7.0, 9.0, 1.0]),
            "head_load": jnp.array([1.0, 0.6, 0.4]),
            "head_load_most": jnp.array(0.6),
            "residual_top": jnp.array([30.0, 20.0, 10.0]),
            "residual_median": jnp.array(0.5),
        },
    ]


def test_narrow_layers_and_missing_statistics_are_nan():
    arrays = probe_arrays(statistics())
    np.testing.assert_array_equal(arrays["entropy"], np.float32([[1, 3, NAN], [2, 4, 5]]))
    np.testing.assert_array_equal(arrays["decay_horizon"], np.float32([[8, 2], [NAN, NAN]]))
    np.testing.assert_array_equal(arrays["residual_median"], np.float32([NAN, 0.5]))
    assert arrays["sink"].shape == (2, 3, 4) and np.isnan(arrays["sink"][0, 2]).all()
    assert all(a.dtype == np.float32 for a in arrays.values())
    assert "value_drain" not in arrays


def test_metrics_are_over_the_heads_that_there_are():
    found = probe_metrics(probe_arrays(statistics()), chosen())
    expected = {
        "attn/entropy_mean": 3.0,
        "attn/sink_rate": 0.4,
        "attn/max_logit": 9.0,
        "attn/decay_horizon": 5.0,
        "moh/max_load": np.float32(0.6),
        "residual/max": 30.0,
    }
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-6)


def test_layers_of_several_kinds_are_told_apart():
    arrays = probe_arrays(statistics())
    found = probe_metrics(arrays, chosen(), ["linear", "full"])
    assert found.items() >= probe_metrics(arrays, chosen()).items()
    assert found["attn/linear/entropy_mean"] == 2.0
    assert found["attn/full/entropy_mean"] == pytest.approx(11 / 3)
    assert found["attn/full/max_logit"] == 9.0
    assert {name for name in found if "/linear/" in name} == {
        f"attn/linear/{name}" for name in ("entropy_mean", "sink_rate", "decay_horizon")
    }
    assert probe_metrics(arrays, chosen(), ["full", "full"]) == probe_metrics(arrays, chosen())


def test_nothing_measured_is_no_metric():
    assert probe_metrics({"head_load_most": np.float32([NAN, NAN])}, chosen()) == probe_metrics({}, chosen()) == {}


def test_what_no_head_has_is_no_metric():
    assert probe_metrics({"induction": np.full((2, 2), NAN, np.float32)}, chosen()) == {}


def test_padded_layers():
    np.testing.assert_array_equal(padded_layers([np.ones(1), None], (2,)), np.float32([[1, NAN], [NAN, NAN]]))


def test_layers_are_described():
    assert describe_layers(hybrid().model) == [
        {"index": 0, "mixer": "gated_deltanet", "kind": "linear", "num_heads": 2, "head_kinds": ["state"] * 2},
        {"index": 1, "mixer": "moh+softmax", "kind": "full", "num_heads": 4, "head_kinds": ["attention"] * 4},
    ]


@pytest.mark.parametrize("around", ["", "moh+"])
def test_a_window_is_called_one(around):
    base = tiny().model.mixers["softmax"]
    one = lambda mixer: MoHConfig(mixer=mixer, top_k=1) if around else mixer
    mixers = {f"{around}softmax": one(base), f"{around}softmax/near": one(dataclasses.replace(base, window_size=8))}
    model = dataclasses.replace(tiny().model, pattern=",".join(mixers), num_layers=2, mixers=mixers)
    kinds = [layer["kind"] for layer in describe_layers(model)]
    assert kinds == ["full", "window"] and set(kinds) <= set(KINDS) == set(KIND_COLOURS)


def test_heads_of_a_parallel_layer_are_described_one_by_one():
    softmax = tiny().model.mixers["softmax"]
    mixers = {"parallel": ParallelConfig(parts=(softmax, Mamba2Config.example()))}
    model = dataclasses.replace(tiny().model, pattern="parallel", num_layers=1, mixers=mixers)
    (layer,) = describe_layers(model)
    assert layer["kind"] == "parallel" and layer["head_kinds"] == ["attention"] * 2 + ["state"] * (layer["num_heads"] - 2)
    assert layer["num_heads"] > 2
