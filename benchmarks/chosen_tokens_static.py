"""Cycles of the TPU kernels for tokens that queries choose one by one, beside full causal attention: estimates of libtpu's compiler.

    python benchmarks/chosen_tokens_static.py v5e,v6e [--heads 128] [--chosen 2048] [--seq-lens 32768,131072] [--stats] [--products]
    python benchmarks/chosen_tokens_static.py v5e,v6e --indexer [--heads 128] [--seq-lens 32768]

Both are of DeepSeek's shape: full attention has keys of 192 and values of 128 channels of each head, that to chosen tokens one latent of
512 and 64 channels for all heads. The promise is full attention's operations over those of the chosen pairs; the indexer, which both would
need, is in neither: `--indexer` gives what it takes, choosing (of a query that reaches all T tokens) and its loss. Chunks are those that the
kernel's lists have, also where keys are more than a core holds and so several tables.
Nothing runs. Copies by hand have no estimate: that of a table, once a sequence, and of lists, is not counted.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import tpu_static

LATENT, ROTARY, HEAD, QUERIES = 512, 64, 128, 8
SAMPLE = 64
"""Grid steps of a row whose chunks are counted."""
STEPS = 2
"""Grid steps: of one alone the lists would have an address that the compiler knows."""
INDEX_HEADS, INDEX_DIM = 64, 128
COUNTS = 17
"""Of three thresholds, at most: sixteen to find a word, and one of two."""
SHAPE = (1, 2048, 1, HEAD + ROTARY, 0)


def kernel(job: dict[str, Any], array: Any) -> tuple[Any, tuple[Any, ...]]:
    """Grid steps of eight queries, each of which has `job["chunks"]` chunks of `job["chunk"]` tokens and, if `job["ends"]`, its end."""
    from dataclasses import replace
    from functools import partial

    import jax.numpy as jnp

    from plait.kernels.attention.tpu.tokens import chunks as by_chunks
    from plait.kernels.attention.tpu.tokens import kernels, tables
    from plait.kernels.index_divergence.tpu import chosen_scores, mean_weights

    chunks, size, heads, sums = job["chunks"], job["chunk"], job["heads"], "gradients" in job["kernel"]
    each = by_chunks.Chunks.each

    def endless(self: Any, visit: Any, finish: Any = None, *others: Any, **named: Any) -> None:
        each(self, visit, *([] if finish is None else [lambda _: None]), *others, **named)

    by_chunks.Chunks.num_chunks, by_chunks.Chunks.copy = lambda _: jnp.int32(QUERIES * chunks), lambda *_: None
    if not job["ends"]:
        by_chunks.Chunks.each = endless
    if job.get("products"):
        by_chunks.Chunks.move = by_chunks.Chunks.unpack = lambda *_: None
    problem = tables.Problem(
        scale=0.07,
        stats=job["stats"],
        heads=heads,
        key_dim=LATENT + ROTARY,
        value_dim=LATENT,
        dtype=job["dtype"],
        chunk=size,
        rows=4096,
        sums=sums,
        deep=tables.deep(heads),
        batch=tables.batch(),
    )
    if job["kernel"].startswith("index"):
        heads = INDEX_HEADS
        problem = replace(problem, heads=heads, value_dim=0, key_dim=INDEX_DIM, hiding=False)
    elif job["kernel"] != "forward":
        problem = replace(problem, value_dim=LATENT if sums else 0)
    q, far = array(1, STEPS * QUERIES, heads, problem.width), array(1, problem.table_rows * problem.pitch, 128, dtype=jnp.int32)
    numbers = lambda *shape: array(1, STEPS * QUERIES, *shape, dtype=jnp.float32)
    lists = (
        array(1, STEPS, 1, QUERIES * size * chunks, dtype=jnp.int32),
        array(1, STEPS, 1, 2 * QUERIES, dtype=jnp.int32),
    )
    of_token = numbers(size * chunks)
    return {
        "forward": (lambda *x: kernels.forward(problem, *x, q.dtype), (q, far, *lists)),
        "gradients": (
            lambda *x: kernels.gradients(problem, *x),
            (q, array(1, STEPS * QUERIES, heads, LATENT), numbers(5 if job["stats"] else 2, heads), far, *lists),
        ),
        "normalizers": (partial(kernels.forward, problem), (q, far, *lists)),
        "mean_weights": (partial(mean_weights.weights, problem), (q, numbers(heads), far, *lists)),
        "index_scores": (partial(chosen_scores.forward, problem), (q, numbers(heads), far, *lists)),
        "index_gradients": (partial(chosen_scores.gradients, problem), (q, numbers(heads), of_token, far, *lists)),
    }[job["kernel"]]


def choosing(job: dict[str, Any], array: Any) -> tuple[Any, tuple[Any, ...]]:
    """One part of the choice of 128 queries among `job["length"]` tokens: scores, a count of three thresholds, marking or moving up."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from plait.kernels.topk_blocks import tokens_tpu as tokens

    length, chosen = job["length"], job["chosen"]
    problem = tokens.Problem(chosen, True, 1, length // tokens.CHUNK, (length - 1).bit_length())
    place, when = pl.program_id, pl.when

    def kernel(q: Any, c: Any, rows: Any, of_keys: Any, weights: Any, out: Any, words: Any) -> None:
        choice, row = tokens._Choice(problem, words, length // tokens.PART), jnp.zeros((1, tokens.QUERIES), jnp.int32)

        reach = type("Reach", (), {"__getitem__": lambda *_: length})()

        def score(step: Any, _: None) -> None:
            pl.program_id = lambda axis: step if axis == 3 else place(axis)
            pl.when = lambda _: lambda body: body() if body.__name__ == "_score" else None
            tokens._kernel(problem, reach, q, c, rows, of_keys, weights, out, words)

        if job["kernel"] == "score":
            jax.lax.fori_loop(0, length // tokens.CHUNK, score, None)
        elif job["kernel"] == "count":
            out[0, 0, 0:1] = sum(choice.counts([row + n for n in (1, 2, 3)]), row)
        elif job["kernel"] == "mark":
            choice.mark(row, row, row, of_keys)
        else:
            pl.when = lambda _: lambda body: body()
            choice.compact()
        pl.program_id, pl.when = place, when

    numbers = lambda *shape: array(*shape, dtype=jnp.int32)
    call = pl.pallas_call(
        kernel,
        name="topk_tokens",
        out_shape=jax.ShapeDtypeStruct((1, 1, chosen, tokens.QUERIES), jnp.int32),
        grid=(1, 1, 1, 1),
        scratch_shapes=[pltpu.VMEM((length + tokens.PART, tokens.QUERIES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=100 << 20),
    )
    heads = array(1, INDEX_HEADS, tokens.QUERIES, INDEX_DIM), array(1, 1, tokens.CHUNK, INDEX_DIM)
    weights = array(1, 1, INDEX_HEADS, tokens.QUERIES, dtype=jnp.float32)
    return call, (*heads, numbers(1, 1, 2, tokens.QUERIES), numbers(1, 1, 2, length), weights)


def indexer(target: str, length: int, heads: int, chosen: int) -> dict[str, float]:
    """Cycles a query of each part of what the indexer takes, of tokens that fit one table."""
    job = {"target": target, "op": "choosing_tokens", "dtype": "bfloat16", "name": "indexer", "length": length, "chosen": chosen}
    found = {}
    for name, times in (("score", 1), ("count", COUNTS), ("mark", 1), ("compact", 1)):
        found[f"choosing: {name}"] = times * cycles(job | {"kernel": name}) / 128
    for name in ("normalizers", "mean_weights", "index_scores", "index_gradients"):
        one = 512 if name == "index_gradients" else 1024
        job = {"target": target, "op": "chosen_tokens", "dtype": "bfloat16", "name": "chosen", "kernel": name, "stats": False}
        job |= {"heads": heads, "chunk": one}
        part = "loss, where attention tells no lse: normalizers" if name == "normalizers" else f"loss: {name}"
        found[part] = of_query(job, chosen // one)
    job = {"target": target, "op": "plain_indexer", "dtype": "bfloat16", "name": "plain", "length": length, "chosen": chosen}
    for name, queries, told in (("choosing", 512, False), ("loss", length, False), ("loss, told lse", length, True)):
        job |= {"kernel": name, "queries": queries, "heads": heads, "profile": False, "told": told}
        found[f"{name}, plain JAX by XLA's estimates"] = tpu_static._run(job, 900)["others"] / queries
    return found


def of_query(job: dict[str, Any], chunks: float) -> float:
    """Cycles of a query with so many chunks. The estimate has a query's end behind each of its chunks, where the kernel has it once."""
    few, many, ended = (cycles(job | {"chunks": n, "ends": ends}) for n, ends in ((1, False), (3, False), (3, True)))
    return (chunks * (many - few) / 2 + (ended - many) / 3) / (STEPS * QUERIES)


def plain(job: dict[str, Any], array: Any) -> tuple[Any, tuple[Any, ...]]:
    """The same in plain JAX: the choice of `job["queries"]` queries, or the loss of as many as tokens and its gradients."""
    import jax
    import jax.numpy as jnp

    from plait.kernels import Mask, SelectedBlocks, Tokens, index_divergence, topk_blocks

    length, chosen, queries = job["length"], job["chosen"], job["queries"]
    numbers = lambda *shape: array(*shape, dtype=jnp.int32)
    index = (
        array(1, queries, INDEX_HEADS, INDEX_DIM),
        array(1, length, INDEX_DIM),
        array(1, queries, INDEX_HEADS, dtype=jnp.float32),
    )
    if job["kernel"] == "choosing":

        def choose(q: Any, k: Any, weights: Any, at: Any, keys_at: Any) -> Any:
            ones = lambda x: Tokens(None, jnp.ones_like(x), x)
            options = {"top_k": chosen, "block_size": 1, "num_blocks": length, "num_local": 0, "by_group": True}
            options |= {"weights": weights, "at": ones(at), "blocks_at": ones(keys_at), "implementation": "chunked"}
            return topk_blocks(q, k[:, :, None], **options).indices

        return choose, (*index, numbers(1, queries), numbers(1, length))

    def loss(q: Any, k: Any, weights: Any, of_heads: Any, of_keys: Any, indices: Any, lse: Any = None) -> Any:
        selected = SelectedBlocks(indices=indices, block_size=1, num_blocks=length)
        options = {"mask": Mask(), "selected": selected, "lse": lse, "implementation": "chunked"}
        total = lambda *learned: index_divergence(*learned, of_heads, of_keys, **options).sum()
        return jax.grad(total, (0, 1, 2))(q, k, weights)

    heads = array(1, length, job["heads"], HEAD + ROTARY)
    normalizers = (array(1, length, job["heads"], dtype=jnp.float32),) if job["told"] else ()
    return loss, (*index, heads, heads, numbers(1, length, 1, chosen), *normalizers)


def visits(target: str, length: int, heads: int, chosen: int, *, gradients: bool) -> tuple[int, float]:
    """Chosen tokens a chunk, and chunks of a query: the mean over a causal row of which queries choose at random."""
    from itertools import pairwise

    import jax.numpy as jnp
    import numpy as np

    from plait.kernels.attention.tpu.tokens import tables
    from plait.kernels.chips import CHIPS

    sizes = {
        "heads": heads,
        "key_dim": LATENT + ROTARY,
        "value_dim": LATENT,
        "dtype": "bfloat16",
        "chunk": tables.CHUNK,
        "rows": 0,
    }
    problem = tables.Problem(scale=0.07, stats=False, sums=False, **sizes)
    problem, parts = tables.Tables(problem, length, chosen, CHIPS[target].vector_memory).cut(gradients=gradients)
    rng, rows = np.random.default_rng(0), np.full((1, SAMPLE * QUERIES, chosen), -1, np.int32)
    for n, step in enumerate(rng.integers(length // QUERIES, size=SAMPLE)):
        for query in range(QUERIES):
            seen = step * QUERIES + query + 1
            rows[0, n * QUERIES + query, -seen:] = np.sort(rng.choice(seen, min(seen, chosen), replace=False))
    rows, taken = jnp.array(rows), 0
    for n, share in enumerate(pairwise(tables.ends(problem, parts, rows, aligned=False))):
        _, bounds = tables.listed(problem, rows, tables.Part(n * problem.stride, *share, None))
        taken += int(bounds[..., 1::2].sum() - bounds[..., ::2].sum())
    return problem.chunk, taken / problem.chunk / rows.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=2048)
    parser.add_argument("--seq-lens", default="32768,131072")
    parser.add_argument("--stats", action="store_true")
    parser.add_argument("--indexer", action="store_true")
    parser.add_argument(
        "--products", action="store_true", help="as if rows were there: what a kernel that brings them cannot beat"
    )
    args = parser.parse_args()
    if args.indexer:
        print(f"{args.heads} heads, {args.chosen} tokens, an indexer of {INDEX_HEADS} heads; cycles a query, estimated")
        for target in args.targets.split(","):
            for length in map(int, args.seq_lens.split(",")):
                for part, cost in indexer(target, length, args.heads, args.chosen).items():
                    print(f"| {target} | {length:,} | {part} | {cost:,.0f} |", flush=True)
        return
    print(f"{args.heads} heads, {args.chosen} tokens, bfloat16{', statistics' if args.stats else ''}; cycles a query, estimated")
    print("| chip | heads | pass | T | full | chosen | faster | promised | share |")
    print("|---|---|---|---|---|---|---|---|---|")
    for target in args.targets.split(","):
        for name, full_name in (("forward", "forward"), ("gradients", "all_gradients")):
            job = {"target": target, "op": "attention", "dtype": "bfloat16", "name": "full-stats" if args.stats else "full"}
            tile = cycles(job | {"kernel": full_name, "shape": SHAPE, "value_dim": HEAD, "tile": None}) / (SHAPE[1] / 1024) ** 2
            for length in map(int, args.seq_lens.split(",")):
                chunk, count = visits(target, length, args.heads, args.chosen, gradients=name == "gradients")
                job = {"target": target, "op": "chosen_tokens", "dtype": "bfloat16", "name": "chosen", "kernel": name}
                job |= {"heads": args.heads, "chunk": chunk, "stats": args.stats, "products": args.products}
                cost = of_query(job, count)
                full = args.heads * tile * length / 2 / 1024**2
                mean = args.chosen - args.chosen * (args.chosen - 1) / 2 / length
                promised = length / 2 * (2 * HEAD + ROTARY) / (mean * (2 * LATENT + ROTARY))
                print(
                    f"| {target} | {args.heads} | {name} | {length:,} | {full:,.0f} | {cost:,.0f} | {full / cost:.2f} | {promised:.2f} "
                    f"| {full / cost / promised:.0%} |",
                    flush=True,
                )


def cycles(job: dict[str, Any]) -> float:
    """Of the kernels of a job; NaN without an estimate."""
    found = tpu_static._run(job, 600)["kernels"]
    return math.nan if found is None else sum(found.values())


if __name__ == "__main__":
    main()
