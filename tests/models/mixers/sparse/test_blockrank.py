"""BlockRank against its block mask and its contrastive loss, token by token in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.attention_losses import AttentionLossConfig, attention_losses
from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.looks.look import Everyone
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.sparse.blockrank import BlockRankConfig
from plait.tests.models.common import assert_decodes_as_the_call, build, layout, quick_jit
from plait.tests.models.mixers.sparse.test_masked import HEAD_DIM, HEADS, LENGTH, SMALL, WIDTH, softmax
from plait.tests.tolerances import assert_close

D, Q, A = 1, 2, 3
TEXT = [9, 8, D, 5, 6, D, 7, 8, 8, Q, 4, A, 7, 9]
"""The second document answers."""
OTHER = [8, D, 7, Q, 9, A, 6]
"""No document answers."""
CONFIG = BlockRankConfig(**SMALL, document_id=D, query_id=Q, answer_id=A, num_documents=3)


def blocks(text: list[int]) -> np.ndarray:
    """The block of each token: 0 the instruction, from 1 on documents, -1 the query."""
    number, found = 0, []
    for token in text:
        number = -1 if number == -1 or token == Q else number + (token == D)
        found.append(number)
    return np.array(found)


@pytest.mark.proves("blockrank")
def test_the_mask_and_the_loss_are_the_papers():
    """Two texts in a row and padding; heads, then the loss and its gradient in the scale of what the layer reads."""
    layer = CONFIG.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH))
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(TEXT) + len(OTHER)] = TEXT + OTHER
    at = dataclasses.replace(layout((len(TEXT), len(OTHER)), length=LENGTH), ids=jnp.asarray(ids))
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH)), np.float64)
    w = lambda dense: np.asarray(dense.kernel[...], np.float64)
    graph, state = nnx.split(layer)

    def run(state, x, size):
        layer = nnx.merge(graph, state)
        mixed = layer(size * x, at=at, carry={}, observer=Everyone())
        loss = attention_losses(mixed.looks, AttentionLossConfig(document_ranking=2.0))["attention/document_ranking"]
        return loss, mixed.y

    both = quick_jit(jax.value_and_grad(run, argnums=2, has_aux=True))
    (loss, y), slope = both(state, jnp.asarray(x, jnp.float32), jnp.float32(1))
    q, k, v = ((x[0] @ w(dense)).reshape(LENGTH, HEADS, HEAD_DIM) for dense in (layer.q, layer.k, layer.v))
    o = np.zeros_like(q)
    for start, text in ((0, TEXT), (len(TEXT), OTHER)):
        number, here = blocks(text), slice(start, start + len(text))
        seen = (number[:, None] == number[None]) | (number[None] == 0) | (number[:, None] == -1)
        seen &= np.tri(len(text), dtype=bool)
        for h in range(HEADS):
            o[here, h] = softmax(q[here, h] @ k[here, h].T / HEAD_DIM**0.5, seen)[0] @ v[here, h]
    assert_close(y[0], o.reshape(LENGTH, -1) @ w(layer.o))

    def ranking(size: float) -> float:
        number, end = blocks(TEXT), TEXT.index(A)
        in_documents, scores = number > 0, np.zeros(2)
        for i in (end - 1, end):
            for h in range(HEADS):
                z = np.where(in_documents, size**2 * q[i, h] @ k[: len(TEXT), h].T / HEAD_DIM**0.5, -np.inf)
                share = np.exp(z) / np.exp(z).sum()
                scores += np.array([share[number == n].sum() for n in (1, 2)]) / HEADS / 2
        e = np.exp(scores / 0.05)
        return -np.log(e[1] / e.sum())

    assert_close(loss, np.float32(2 * ranking(1.0)))
    assert_close(slope, np.float32(ranking(1 + 1e-5) - ranking(1 - 1e-5)) / np.float32(1e-5))


def test_it_decodes_as_the_call():
    """Markers in prompts and after them."""
    config = LMConfig(
        vocab_size=8,
        d_model=32,
        num_layers=1,
        pattern="blockrank",
        mixers={"blockrank": BlockRankConfig(num_heads=2, head_dim=16)},
    )
    model = build(config, seq_len=LENGTH)
    ids = np.full((2, LENGTH), 5, np.int32)
    ids[0, :13], ids[1, :17] = [4, D, 6, 7, D, 5, 4, 6, Q, 4, 5, 7, 6], [4, 4, D, 6, 7, D, 4, Q, 6, 4, 5, D, 4, 7, 6, 5, 4]
    assert_decodes_as_the_call(model, jnp.asarray(ids))


def test_bad_options_are_refused():
    with pytest.raises(
        ValueError, match=r"query_id=1 must differ from document_id and answer_id; give each marker a token of its own"
    ):
        BlockRankConfig(query_id=1)
    with pytest.raises(ValueError, match=r"temperature=0.1 is of document_ranking, which is None"):
        AttentionLossConfig(temperature=0.1)
    for pattern, mixer, path in (
        ("blockrank", CONFIG, "blockrank.answer_id"),
        ("moh+blockrank", MoHConfig(mixer=CONFIG), r"moh\+blockrank.mixer.answer_id"),
    ):
        config = LMConfig(d_model=WIDTH, num_layers=1, pattern=pattern, mixers={pattern: mixer})
        wrong = rf"mixers.{path}=3 must be a token of the vocabulary, of which there are vocab_size=3; use at most 2"
        with pytest.raises(ValueError, match=wrong):
            dataclasses.replace(config, vocab_size=3)
        assert dataclasses.replace(config, vocab_size=4).vocab_size == 4
