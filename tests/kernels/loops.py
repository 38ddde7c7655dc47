"""What the ops mean, as loops over tokens in float64 that share nothing with `plait.kernels`, its references included.

A row of segment ids is a list of places. A segment is all places of one id other than 0, and a position is how far a place stands from
the first of its segment.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def positions(ids: Sequence[int]) -> list[int | None]:
    """How far each place is from its segment's first; None for padding."""
    ids = list(map(int, ids))
    return [None if i == 0 else t - ids.index(i) for t, i in enumerate(ids)]


def sees(mask: Any, i: int, j: int) -> bool:
    """Whether position i sees position j of its segment."""
    if mask.causal and j > i:
        return False
    if j <= i and j < mask.num_sink_tokens:
        return True
    if hasattr(mask, "num_global_tokens") and min(i, j) < mask.num_global_tokens:
        return True
    if hasattr(mask, "chunk_size"):
        place, kv_place = i + mask.shift, j + mask.kv_shift
        return place // mask.chunk_size == kv_place // mask.chunk_size and (place - kv_place) % (mask.dilation or 1) == 0
    if hasattr(mask, "block_size"):
        back = i // mask.block_size - j // mask.block_size
        return back == 0 or back.bit_count() == 1 or (mask.window_size is not None and i - j < mask.window_size)
    if (i - j) % (mask.dilation or 1):
        return False
    size = mask.window_size if i >= j else mask.right_window_size or mask.window_size
    return size is None or abs(i - j) // (mask.dilation or 1) < size


def attention(
    q: Any,
    k: Any,
    v: Any,
    ids: Any,
    mask: Any,
    *,
    sinks=None,
    sigmoid_bias=None,
    soft_cap=None,
    bias=None,
    selected=None,
    first_k=3,
) -> dict[str, np.ndarray]:
    """All that the attention ops give, by name: o, the statistics, `weights` [B, H, T, T], `first_masses` and `column_mass`.

    `sinks` and `sigmoid_bias` are [H], `bias` is a pair [B, T, H, R], and `selected` is (indices [B, T, Hs, N], block size).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, length, heads, dim), group = q.shape, q.shape[2] // k.shape[2]
    found = {
        "o": np.zeros((batch, length, heads, v.shape[3])),
        "weights": np.zeros((batch, heads, length, length)),
        "first_masses": np.zeros((batch, length, heads, first_k)),
        **{name: np.zeros((batch, length, heads)) for name in ("lse", "max_logit", "entropy", "first_mass", "column_mass")},
    }
    for b, h, i in np.ndindex(batch, heads, length):
        place, seen = positions(ids[b]), []
        for j in range(length):
            if ids[b][i] == 0 or ids[b][j] != ids[b][i] or not sees(mask, place[i], place[j]):
                continue
            if selected is None or place[j] // selected[1] in selected[0][b, i, h // (heads // selected[0].shape[2])]:
                seen.append(j)
        z = q[b, i, h] @ k[b, seen, h // group].T / dim**0.5
        if bias is not None:
            z = z + bias[0][b, i, h] @ bias[1][b, seen, h].T
        z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
        if not seen:
            found["lse"][b, i, h] = -1e30 if sinks is None else sinks[h]
            found["max_logit"][b, i, h] = -1e30
            continue
        log_weights = z if sigmoid_bias is None else -np.logaddexp(0, -(z + sigmoid_bias[h]))
        keys = np.logaddexp.reduce(log_weights)
        shares = np.exp(log_weights - keys)
        lse = keys if sinks is None else np.logaddexp(keys, sinks[h])
        weights = np.exp(log_weights - lse) if sigmoid_bias is None else np.exp(log_weights)
        found["o"][b, i, h] = weights @ v[b, seen, h // group]
        found["weights"][b, h, i, seen] = weights
        found["column_mass"][b, seen, h] += weights
        found["lse"][b, i, h], found["max_logit"][b, i, h] = lse, z.max()
        found["entropy"][b, i, h] = -(shares * (log_weights - keys)).sum()
        for j, weight in zip(seen, np.exp(log_weights - lse)):
            if place[j] < first_k:
                found["first_masses"][b, i, h, place[j]] = weight
    found["first_mass"] = found["first_masses"][..., 0]
    return found


def short_conv(x: Any, weight: Any, bias: Any, before: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Outputs before the activation, and the last inputs. `before` stands before the first place, in the first token's segment."""
    x, weight, before = (np.asarray(a, np.float64) for a in (x, weight, before))
    (batch, length, _), reach = x.shape, len(weight) - 1
    y, last = np.zeros(x.shape), np.array(before)
    for b in range(batch):
        real = [t for t in range(length) if ids[b][t] != 0]
        owner = {t: int(ids[b][t]) for t in range(length)} | {t: int(ids[b][real[0]]) if real else 0 for t in range(-reach, 0)}
        value = lambda t, b=b: x[b, t] if t >= 0 else before[b, t + reach]
        for t in real:
            taps = [weight[reach - back] * value(t - back) for back in range(reach + 1) if owner[t - back] == owner[t]]
            y[b, t] = np.asarray(bias, np.float64) + sum(taps)
        if real:
            places = range(real[-1] - reach + 1, real[-1] + 1)
            last[b] = [value(t) if owner[t] == owner[real[-1]] else 0 * x[b, 0] for t in places]
    return y, last


def recurrence(
    state: Any, ids: Any, *, q: Any, k: Any, v: Any, g: Any = None, beta: Any = None, a: Any = None, b: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and final state of decay, of the delta rule (with `beta`) and of a diagonal plus rank one (with `a` and `b`): one token
    after the other."""
    q, k, v, state = (np.array(x, np.float64) for x in (q, k, v, state))
    along, to = (None if x is None else np.asarray(x, np.float64) for x in (a, b))
    (batch, length, qk_heads, dim), heads = q.shape, v.shape[2]
    o = np.zeros(v.shape)
    for n, h in np.ndindex(batch, heads):
        group, before = h // (heads // qk_heads), None
        for t in range(length):
            if ids[n][t] == 0:
                continue
            if before not in (None, ids[n][t]):
                state[n, h] = 0
            before = ids[n][t]
            moved = None if along is None else np.outer(to[n, t, group], along[n, t, group] @ state[n, h])
            if g is not None:
                state[n, h] *= np.exp(np.asarray(g[n, t, h], np.float64)).reshape(-1, 1)
            key, new = k[n, t, group], v[n, t, h]
            if beta is not None:
                new = float(beta[n, t, h]) * (new - key @ state[n, h])
            state[n, h] += np.outer(key, new) + (0 if moved is None else moved)
            o[n, t, h] = q[n, t, group] @ state[n, h] / dim**0.5
    return o, state


def topk_blocks(
    q: Any, k: Any, ids: Any, *, top_k: int, block_size: int, num_local: int = 1, num_first: int = 0, by_group=False, scale=None
) -> list:
    """The set of blocks of its segment that each head of each query chooses, by row of the batch."""
    q, k, ids = np.asarray(q, np.float64), np.asarray(k, np.float64), np.asarray(ids)
    (batch, length, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    chosen = [[[set() for _ in range(heads)] for _ in range(length)] for _ in range(batch)]
    for b, i, h in np.ndindex(batch, length, heads):
        if not ids[b, i]:
            continue
        place = positions(ids[b])
        own = place[i] // block_size
        tokens = lambda n, b=b, i=i, place=place: [
            j for j in range(length) if ids[b, j] == ids[b, i] and place[j] // block_size == n
        ]
        means = {n: np.mean([k[b, j, h // group] for j in tokens(n)], axis=0) for n in range(own + 1) if tokens(n)}
        past, scores = [n for n in means if n < own], dict.fromkeys(means, 0.0)
        for head in range(h // group * group, h // group * group + group) if by_group else (h,):
            z = {n: q[b, i, head] @ mean for n, mean in means.items() if scale is None or (n + 1) * block_size <= place[i] + 1}
            total = 1.0 if scale is None else sum(np.exp(scale * x) for x in z.values())
            for n, x in z.items():
                scores[n] += x if scale is None else np.exp(scale * x) / total
        forced = {own, *(n for n in past if n > own - num_local or n < num_first)}
        best = sorted((n for n in past if n not in forced), key=lambda n: -scores[n])[: max(0, top_k - len(forced))]
        chosen[b][i][h] = {*forced, *best}
    return chosen
