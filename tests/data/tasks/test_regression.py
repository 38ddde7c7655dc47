"""In-context regression: rows read back, the laws they are drawn from, and the baselines against direct solutions in float64."""

import math

import numpy as np
import pytest

from plait.data.config import DataConfig
from plait.data.loader import build_data
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED
from plait.data.tasks.linear_fits import least_squares, ridge, share_between
from plait.data.tasks.regression import RegressionTask
from plait.tests.tolerances import assert_close


def read(task, tokens, targets):
    """Inputs [R, N, D] and results [R, N] of whole examples, by the middles of their bins."""
    width = 8 / task.num_bins
    step = task.num_dims + 1
    stream = np.concatenate([tokens, np.where(targets[:, -1:] < 0, 0, targets[:, -1:])], axis=1)
    count = (tokens.shape[1] + 1) // step
    grouped = stream[:, : count * step].reshape(len(stream), count, step)
    return -4 + width * (grouped[..., :-1] + 0.5), -4 + width * (grouped[..., -1] - task.num_bins + 0.5)


@pytest.mark.parametrize(("dims", "seq_len"), [(1, 8), (3, 11), (3, 13), (2, 5)])
def test_results_are_those_of_one_linear_function_a_row(dims, seq_len):
    """Up to half a bin, wherever they are inside of the outer bins; each is asked where the last of its inputs stands."""
    task = RegressionTask(num_dims=dims, num_bins=512)
    tokens, targets = task.generate(Draws(np.arange(200), "test"), seq_len)
    assert ((targets != NOT_ASKED) == (np.arange(1, seq_len + 1) % (dims + 1) == dims)).all()
    inner = targets[:, :-1] != NOT_ASKED
    assert (tokens[:, 1:][inner] == targets[:, :-1][inner]).all(), "a result that was asked for stands next"
    is_result = np.arange(seq_len) % (dims + 1) == dims
    assert (tokens[:, is_result] >= 512).all() and (tokens[:, ~is_result] < 512).all() and tokens.max() < 1024
    x, y = read(task, tokens, targets)
    if x.shape[1] > dims:
        slack = 8 / 512
        for inputs, results in zip(x, y):
            if np.abs(results).max() < 3.9:
                weights = np.linalg.lstsq(inputs, results, rcond=None)[0]
                assert np.abs(inputs @ weights - results).max() <= slack


def test_inputs_and_functions_are_standard_normal():
    """Then a result over the root of d has a variance of 1, whatever d."""
    count = 20_000
    for dims in (1, 4):
        task = RegressionTask(num_dims=dims, num_bins=1024)
        x, y = read(task, *task.generate(Draws(np.arange(count), "test"), 2 * dims + 1))
        assert abs(x[:, 0].mean()) < 5 / math.sqrt(count) and abs(x[:, 0].std() - 1) < 5 / math.sqrt(count)
        fourth = 9 if dims == 1 else 3 * (1 + 2 / dims)  # of a product of normal variables
        assert abs(np.square(y[:, 0]).mean() - 1) < 5 * math.sqrt((fourth - 1) / count) + 0.02
    noisy = RegressionTask(num_dims=4, num_bins=1024, noise_std=2.0)
    _, y = read(noisy, *noisy.generate(Draws(np.arange(count), "test"), 9))
    assert np.square(y[:, 0]).mean() == pytest.approx(1 + 4 / 4, abs=0.15)


def test_ridge_and_least_squares_are_the_direct_solutions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 9, 3)), rng.normal(size=(6, 9))
    prior, noise = 0.4, np.full((6, 9), 0.05)
    noise[:, 2] = np.inf
    found = ridge(x, y, prior=prior, noise=noise)
    for row in range(6):
        for k in range(9):
            seen = [i for i in range(k) if i != 2]
            precision = x[row, seen].T @ x[row, seen] / 0.05 + np.eye(3) / prior
            weights = np.linalg.solve(precision, x[row, seen].T @ y[row, seen] / 0.05)
            assert_close(found.mean[row, k], x[row, k] @ weights)
            assert_close(found.variance[row, k], x[row, k] @ np.linalg.solve(precision, x[row, k]))
            plain = np.linalg.lstsq(x[row, :k], y[row, :k], rcond=None)[0] if k else np.zeros(3)
            assert_close(least_squares(x, y, k)[row], x[row, k] @ plain)


def test_shares_of_a_normal_distribution():
    low, high = np.array([-np.inf, 0.0, 1.0, 30.0, -1.0]), np.array([0.0, np.inf, 2.0, np.inf, 1.0])
    found = share_between(low, high, np.zeros(5), np.ones(5))
    assert_close(found, np.array([0.5, 0.5, 0.13590512198327787, 4.906713927148187e-198, 0.6826894921370859]))
    assert share_between(np.array([0.0]), np.array([1.0]), np.array([0.5]), np.zeros(1)) == 1


def test_errors_are_of_the_told_bins_and_fall_as_published(tmp_path):
    """A model that tells the truth has none, one that tells no number that of 0; ridge falls below noise behind d examples."""
    task = RegressionTask(num_dims=3, num_bins=256)
    batch = build_data(DataConfig(task=task, seq_len=27, batch_size=600), tmp_path).read_train(np.arange(600))
    truth, nothing = task.distances(batch, batch.targets), task.distances(batch, np.zeros_like(batch.targets))
    mean = lambda found, name: found[name][0] / found[name][1]
    assert mean(truth, "error") == 0 and truth["error"][1] == 600 * 7
    assert mean(nothing, "error_after_0") == mean(nothing, "ridge_error_after_0") == mean(nothing, "least_squares_error_after_0")
    assert mean(truth, "ridge_error_after_0") == pytest.approx(1, abs=0.3)
    falling = [mean(truth, f"ridge_error_after_{k}") for k in range(7)]
    expected = [1 - k / 3 for k in range(3)]  # what weights of k directions leave of three
    np.testing.assert_allclose(falling[:3], expected, atol=0.3)
    assert max(falling[5:]) < 0.01 and {name for name in truth if name.endswith("_7")} == set()
    off = np.where(batch.targets == 511, 510, batch.targets + 1)  # a bin away
    assert mean(task.distances(batch, off), "error") == pytest.approx((8 / 256) ** 2, rel=0.05)


def test_ridge_has_the_variances_of_the_task(tmp_path):
    """Weights of 1/d, noise of noise_std^2/d and of the rounding: solved for each result by itself."""
    task = RegressionTask(num_dims=2, num_bins=16, noise_std=0.8)
    batch = build_data(DataConfig(task=task, seq_len=14, batch_size=5), tmp_path).read_train(np.arange(5))
    x, y = read(task, batch.tokens, batch.targets)
    normal = lambda z: (1 + math.erf(z / math.sqrt(2))) / 2
    errors, losses = [], []
    for row in range(5):
        for k in range(5):
            seen = [i for i in range(k) if abs(y[row, i]) < 3.5]
            precision = x[row, seen].T @ x[row, seen] / (0.32 + 0.25 / 12) + 2 * np.eye(2)
            mean = x[row, k] @ np.linalg.solve(precision, x[row, seen].T @ y[row, seen] / (0.32 + 0.25 / 12))
            spread = math.sqrt(x[row, k] @ np.linalg.solve(precision, x[row, k]) + 0.32)
            low, high = (-np.inf if y[row, k] < -3.5 else y[row, k] - 0.25), (np.inf if y[row, k] > 3.5 else y[row, k] + 0.25)
            losses.append(-math.log(normal((high - mean) / spread) - normal((low - mean) / spread)))
            errors.append((mean - y[row, k]) ** 2)
    found = task.distances(batch, batch.targets)
    assert_close(np.array(found["ridge_error"]), np.array([sum(errors), 25.0]))
    assert_close(np.array(found["ridge_loss"]), np.array([sum(losses), 25.0]))


def test_ridge_loss_is_near_that_of_all_functions_weighed_exactly(tmp_path):
    """In one dimension, by a sum over weights on a fine grid of what fell into each bin: what no model can go below."""
    task = RegressionTask(num_dims=1, num_bins=32)
    batch = build_data(DataConfig(task=task, seq_len=16, batch_size=400), tmp_path).read_train(np.arange(400))
    weights = np.linspace(-6, 6, 48_001)
    belief = np.tile(np.exp(-np.square(weights) / 2), (400, 1))
    losses = []
    for place in range(0, 16, 2):
        x = -4 + 0.25 * (batch.tokens[:, place, None] + 0.5)
        falls = np.clip(np.floor((weights * x + 4) * 4), 0, 31) == batch.targets[:, place, None] - 32
        belief /= belief.sum(1, keepdims=True)
        belief = belief * falls
        losses.append(-np.log(np.maximum(belief.sum(1), 1e-12)))
    total, count = task.distances(batch, batch.targets)["ridge_loss"]
    exact = np.mean(losses)
    assert exact < total / count < exact + 0.12


@pytest.mark.parametrize(
    ("fields", "seq_len", "message"),
    [
        ({"num_dims": 20}, 40, r"data\.task\.num_dims=20 needs rows of at least 41 tokens, .*data\.seq_len=40; use 19 or less"),
        ({}, 2, r"num_dims=5 needs rows of at least 11 tokens, .* use data\.seq_len=11 or more"),
        ({"num_bins": 1}, 64, r"regression\.num_bins=1 must be a whole number from 2"),
        ({"noise_std": float("nan")}, 64, r"regression\.noise_std=nan must be a finite number"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(fields, seq_len, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(task=RegressionTask(**fields), seq_len=seq_len)
