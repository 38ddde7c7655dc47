"""Pictures of tokens: scales have numbers, and what is not finite leaves a gap."""

import matplotlib
import numpy as np
import pytest

from plait.train.inspection.tokens import TokenByToken
from plait.train.report.panels import tokens
from plait.train.report.style import RC


def told(largest):
    maps = np.full((len(largest), 1, 3, 3), np.nan)
    return TokenByToken(names=list("abc"), before=0, losses=np.zeros(3), maps=maps, largest=largest, median=np.ones(len(largest)))


@pytest.mark.parametrize(
    ("largest", "numbers"), [([2.0, 3.0, 8.0], ["2", "8"]), ([0.0, 3.0, 4e3], ["10", "100", "1k"]), ([np.nan] * 3, None)]
)
def test_sizes_have_a_scale_with_numbers(largest, numbers, monkeypatch):
    figures = []
    monkeypatch.setattr(tokens, "picture", lambda name, figure, caption: figures.append(figure))
    with matplotlib.rc_context(RC):
        tokens.sizes(["all heads"], [told(np.array([largest]))], "")
        figures[0].canvas.draw()
    scales = [[label.get_text() for label in bar.get_xticklabels()] for bar in figures[0].axes[0].child_axes]
    assert scales == ([] if numbers is None else [numbers])
