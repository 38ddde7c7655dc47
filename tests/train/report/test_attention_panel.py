"""Attention pictures: which heads are chosen, and how tokens are labelled."""

import numpy as np

from plait.train.report.panels.attention import choose_heads, head_scores, normalise, shown


def test_chosen_heads_are_the_extreme_ones_and_differ():
    maps = np.zeros((1, 3, 8, 8))
    maps[0, 0, :, 0] = 1  # all on the first token
    maps[0, 1] = np.eye(8)  # most local
    maps[0, 2] = np.tril(np.ones((8, 8)))  # broadest
    maps[0, 2, :, 1] *= -1
    normal = normalise(maps)
    assert np.allclose(np.abs(normal).sum(-1), 1)
    chosen = {reason: head for _, head, reason, _ in choose_heads(head_scores(normal), [0])}
    assert chosen == {"most on first": 0, "most local": 1, "sharpest": 2}


def test_head_that_a_layer_does_not_have_is_never_chosen():
    maps = np.full((1, 2, 4, 4), np.nan)
    maps[0, 0] = np.eye(4)
    assert {head for _, head, *_ in choose_heads(head_scores(normalise(maps)), [0])} == {0}


def test_token_labels_show_white_space_and_stay_short():
    assert shown(" a\n") == "·a↵" and shown("\x00") == "□" and len(shown("x" * 50)) == 8
