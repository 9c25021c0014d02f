"""Attention of long rows, which never has a score for every pair at once: numbers of the definition, and memory."""

from __future__ import annotations

import numpy as np
import pytest

PADDED = [[0] * 9 + [1] * 291, [0] * 130 + [1] * 150 + [0] * 20, [0] * 300]
"""The second row is padded at both ends, the third is nothing else."""
PACKED = [[1] * 40 + [2] * 200 + [3] * 60, [1] * 131 + [2] * 100 + [0] * 69, [0] * 300]
CASES = {
    "padded": (PADDED, bool, {}),
    "packed": (PACKED, int, {}),
    "window": (PADDED, bool, {"window": 37}),
    "wide window": (PADDED, bool, {"window": 150}),
    "packed, window, softcap": (PACKED, int, {"window": 70, "cap": 3.0}),
    "softcap": (PADDED, bool, {"cap": 2.0}),
    "after known columns": (PADDED, bool, {"known": 75}),
    "one head each": (PADDED, bool, {"kv_heads": 4}),
}
HEADS, SIZE = 4, 8


def by_definition(q, k, v, numbers, d_out, *, window=None, cap=None, known=0):
    """Output and the gradients of q, k and v of softmax(cap tanh(q kᵀ / (cap √d))) v, one query after the other, float64. A query
    that sees nothing gives zeros."""
    q, k, v, d_out = (array.astype(np.float64) for array in (q, k, v, d_out))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for row, head, i in np.ndindex(*q.shape[:3]):
        own = known + i
        shared = head // (q.shape[1] // k.shape[1])
        seen = [
            j
            for j in range(0 if window is None else max(0, own - window + 1), own + 1)
            if numbers[row][j] and (numbers[row][j] == numbers[row][own] or not numbers[row][own])
        ]
        if not seen or not numbers[row][own]:
            continue
        keys, values, query = k[row, shared, seen], v[row, shared, seen], q[row, head, i]
        raw = keys @ query / np.sqrt(len(query))
        scores = raw if cap is None else cap * np.tanh(raw / cap)
        p = np.exp(scores - scores.max())
        p /= p.sum()
        out[row, head, i] = p @ values
        d_p = values @ d_out[row, head, i]
        d_raw = (np.diag(p) - np.outer(p, p)) @ d_p * (1 if cap is None else 1 - np.tanh(raw / cap) ** 2)
        dq[row, head, i] = d_raw @ keys / np.sqrt(len(query))
        dk[row, shared, seen] += np.outer(d_raw, query) / np.sqrt(len(query))
        dv[row, shared, seen] += np.outer(p, d_out[row, head, i])
    return out, dq, dk, dv


def inputs(numbers, *, known=0, kv_heads=2, **_):
    """q, k, v, and a gradient of the output that is 0 at padding."""
    rng, (rows, columns) = np.random.default_rng(0), np.shape(numbers)
    draw = lambda heads, length: rng.normal(size=(rows, heads, length, SIZE)).astype(np.float32)  # noqa: E731
    d_out = draw(HEADS, columns - known) * (np.array(numbers)[:, None, known:, None] > 0)
    return 2 * draw(HEADS, columns - known), 2 * draw(kv_heads, columns), draw(kv_heads, columns), d_out


@pytest.mark.parametrize("case", CASES)
def test_jax_agrees_with_the_definition(case):
    jax = pytest.importorskip("jax")
    from lockstep_jax import attention

    numbers, kind, options = CASES[case]
    q, k, v, d_out = inputs(numbers, **options)
    window, cap, known = (options.get(name, default) for name, default in (("window", None), ("cap", None), ("known", 0)))
    visible = attention.causal(jax.numpy.array(numbers, kind), known).near(window, known)
    assert isinstance(visible, attention.Blocks)

    def attend(q, k, v):
        groups = q.reshape(len(q), k.shape[1], -1, *q.shape[2:])
        out = visible.attend(SIZE**-0.5, cap, groups, k, v)
        return out.reshape(len(q), q.shape[2], HEADS, SIZE).swapaxes(1, 2)

    out, pullback = jax.vjp(jax.jit(attend), q, k, v)
    found = out * (d_out != 0), *pullback(d_out)
    for array, expected in zip(found, by_definition(q, k, v, numbers, d_out, window=window, cap=cap, known=known), strict=True):
        np.testing.assert_allclose(array, expected, atol=2e-5 * np.abs(expected).max())
