"""Runs that differ in seeds alone are one variant of a comparison, and a winner inside the noise is none."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from plait.train.report import compared, page
from plait.train.report.panels import seeds
from plait.train.report.run import Run
from plait.train.report.style import run_colour
from plait.train.report.variants import by_variant, difference, differing, validated, variants, verdict, whose
from plait.train.run_folder.probe_files import ProbeSeries


def run(name, loss, seed=0, *, width=64, mixer="gla", **config):
    """A run of two validations."""
    model = {"d_model": width, "mixers": {mixer: {"num_heads": 2}}, "pattern": mixer}
    tree = {"seed": seed, "data": {"seed": seed, "cache_dir": name}, "out": name, "model": model, **config} if width else {}
    records = [
        {"step": step, "tokens": step * 8, "loss/val": loss + 1 / step, "loss/train": loss + 1 / step} for step in (1, 1000)
    ]
    return Run(Path(name), name, tree, {}, records, [], ProbeSeries(np.zeros(0, int), {}, [], 4, []), None, [])


def test_seeds_and_places_do_not_set_runs_apart():
    runs = [run("b-seed1", 2.0, 1), run("a-seed0", 3.0, 0, width=32), run("b-seed0", 2.1), run("again", 2.0, 1)]
    found = by_variant([*runs, run("lost", 2.0, width=None), run("lost too", 2.0, width=None)])
    assert [(one.place, one.repeats) for one in found] == [(0, 2), (1, 1), (0, 2), (2, 1), (3, 1), (4, 1)]
    assert [one.name for one in variants(found)] == ["b (2 seeds)", "a-seed0", "again", "lost", "lost too"]


def test_runs_of_a_sweep_are_called_by_what_sets_their_arm_apart():
    names = ["seed=0,data.seed=0-05cf02fa35", "seed=1,data.seed=1-15cf02fa35"]
    other = [
        "s/pattern=gla,softmax,learning_rate=3e-3,seed=0-0000000000",
        "s/pattern=gla,softmax,learning_rate=3e-3,seed=1-1000000000",
    ]
    runs = [run(name, 2.0, i, width=width) for width, two in ((64, names), (32, other)) for i, name in enumerate(two)]
    runs = by_variant([*runs, run("alone", 2.0, width=16)])
    arm = "s/pattern=gla,softmax,learning_rate=3e-3"
    assert [one.name for one in variants(runs)] == ["as the preset (2 seeds)", f"{arm} (2 seeds)", "alone"]
    assert [whose(runs[i], runs) for i in (3, 4)] == [f"seed 1 of {arm}", "alone"]


def test_it_is_said_on_how_much_was_validated():
    facts = {"validation": {"batches": 2, "of": 638, "rows": 16, "row_tokens": 64}, "data": {"corpus": "x"}}
    ours = [
        dataclasses.replace(run(f"a-{seed}", 2.0, seed), environment=facts, config={"data": {"seed": seed, "val_fraction": 0.1}})
        for seed in (0, 1)
    ]
    found = variants(by_variant(ours))
    assert validated(found).startswith(
        "Measured on 1,024 tokens (2 of 638 batches, 16 rows of 64). Which text is held out differs"
    )
    assert validated(variants(by_variant(ours[:1]))) == "Measured on 1,024 tokens (2 of 638 batches, 16 rows of 64)."


@pytest.mark.parametrize(
    ("others", "said"),
    {
        "one seed": ([2.5], "whether that is more than noise is not known"),
        "beyond": (
            [2.5, 2.61, 2.7],
            "has the lowest loss, 2.101 in the mean, 0.503 below the next, b (3 seeds) (95% interval ±0.0",
        ),
        "inside": (
            [2.3, 2.0, 2.3],
            "No variant has the lowest loss beyond the noise: a (3 seeds), 2.101 in the mean, is 0.100 below",
        ),
    }.values(),
    ids=["one seed", "beyond", "inside"],
)
def test_a_winner_is_one_beyond_the_noise(others, said):
    """Paired by seeds: [0.3, -0.1, 0.1] has a t interval far wider than its mean."""
    ours = [run(f"a-{seed}", loss, seed) for seed, loss in enumerate((2.0, 2.1, 2.2))]
    theirs = [run(f"b-{seed}", loss, seed, width=32) for seed, loss in enumerate(others)]
    found = variants(by_variant([*theirs, *ours]))
    assert said in verdict(found, "loss/val", "loss")
    assert verdict(found[:1], "loss/val", "loss") is None


def test_the_interval_is_that_of_paired_seeds():
    """Hand-worked: differences 0.4, 0.5, 0.6 have a standard error of 0.1 / sqrt(3), and t(2) = 4.3027 at 97.5%."""
    pairs = enumerate(((2.0, 2.4), (3.0, 3.5), (4.0, 4.6)))
    runs = [one for seed, (a, b) in pairs for one in (run(f"a{seed}", a, seed), run(f"b{seed}", b, seed, width=32))]
    one, other = variants(by_variant(runs))
    found = difference(other, one, "loss/val")
    assert found.mean == pytest.approx(0.5) and found.half == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-4) and found.count == 3


def test_settings_that_follow_from_others_are_left_out():
    found = variants(by_variant([run("a", 2.0), run("b", 2.0, mixer="softmax")]))
    assert list(differing(found)) == ["model.pattern"]
    assert list(differing(variants(by_variant([run("a", 2.0), run("b", 2.0, width=32)])))) == ["model.d_model"]


def test_a_line_of_a_table_is_a_variant_with_its_range():
    runs = by_variant([run("a-0", 2.0), run("a-1", 2.2, 1), run("b<", 2.6, width=32)])
    told = compared.stories(runs)
    table = told.partition('class="dense sorts"')[2].partition("</table>")[0]
    assert table.count("<tr>") == 3 and "a (2 seeds)" in table and "2.101<small>2.001 to 2.201</small>" in table
    assert "<th>d_model</th>" in table and "b&lt;" in table and "b<" not in table and "data.seed" not in table
    assert "table.sorts" in page.page("plait t", "", [page.Section("a", "a", [page.Markup(told)])], made="", reload=None)


def test_lines_of_seeds_are_thin_and_their_mean_is_thick():
    runs = by_variant([run("a-0", 2.0), run("a-1", 2.0, 1), run("b", 2.0, width=32)])
    ax = Figure().add_subplot()
    first, second, third = (
        (np.array([0, 10, 20]), np.array([1.0, 2, 4])),
        (np.array([0, 20]), np.array([3.0, 6])),
        (np.array([0]), np.ones(1)),
    )
    seeds.draw(ax, runs, {0: first, 1: second, 2: third})
    thin, thinner, alone, mean = ax.lines
    assert max(thin.get_linewidth(), thinner.get_linewidth()) < alone.get_linewidth() < mean.get_linewidth()
    assert [line.get_color() for line in ax.lines] == [run_colour(0), run_colour(0), run_colour(1), run_colour(0)]
    assert mean.get_xdata().tolist() == [0, 20] and mean.get_ydata().tolist() == [2.0, 5.0], "over the steps that both have"
