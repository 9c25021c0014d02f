"""Attention of long rows, which never has a score for every pair at once: numbers of the definition, and memory."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest

from conftest import relative
from lockstep.interfaces import Dropout
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.registry import registry
from lockstep.text.sequences import Sequences, pack, share_rows
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss, next_token_terms

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


@pytest.fixture
def cudnn(monkeypatch):
    """Stands in for cuDNN's kernel, which takes and gives bfloat16 alone: the numbers of keys that it was called with."""
    jax = pytest.importorskip("jax")
    formula, calls = jax.nn.dot_product_attention, []

    def kernel(q, k, v, mask, *, scale, implementation):
        assert implementation == "cudnn" and {x.dtype for x in (q, k, v)} == {jax.numpy.bfloat16.dtype}
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0
        calls.append(k.shape[1])

        @jax.custom_vjp
        def attend(q, k, v, mask):
            return formula(q, k, v, mask=mask, scale=scale)

        def backward(kept, gradient):
            assert gradient.dtype == jax.numpy.bfloat16
            *kept, mask = kept
            return *jax.vjp(lambda *x: formula(*x, mask=mask, scale=scale), *kept)[1](gradient), None

        attend.defvjp(lambda *x: (attend(*x), x), backward)
        return attend(q, k, v, mask)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return calls


@pytest.mark.parametrize("case", [name for name, (_, _, options) in CASES.items() if "cap" not in options])
def test_the_form_for_gpus_agrees_with_the_definition(case, cudnn):
    jax = pytest.importorskip("jax")
    from lockstep_jax import attention

    numbers, kind, options = CASES[case]
    window, known = options.get("window"), options.get("known", 0)
    arrays = inputs(numbers, **options)
    visible = attention.causal(jax.numpy.array(numbers, kind), known, fused=True).near(window, known)
    assert isinstance(visible, attention.Fused)

    def attend(q, k, v):
        q, k, v = (x.astype(jax.numpy.bfloat16) for x in (q, k, v))
        out = visible.attend(SIZE**-0.5, None, q.reshape(len(q), k.shape[1], -1, *q.shape[2:]), k, v)
        return out.reshape(len(q), q.shape[2], HEADS, SIZE).swapaxes(1, 2).astype(jax.numpy.float32)

    *given, d_out = (np.asarray(jax.numpy.asarray(array, jax.numpy.bfloat16), np.float32) for array in arrays)
    out, pullback = jax.vjp(jax.jit(attend), *given)
    found = out * (d_out != 0), *pullback(d_out)
    assert cudnn
    for array, expected in zip(found, by_definition(*given, numbers, d_out, window=window, known=known), strict=True):
        np.testing.assert_allclose(array, expected, atol=0.02 * np.abs(expected).max())


def test_a_network_on_a_gpu_trains_through_that_form(folders, cudnn, monkeypatch):
    """Its gradients are those of the other form, and come to the kernel in bfloat16."""
    jax = pytest.importorskip("jax")
    from lockstep_jax import attention, decoder, layers

    for module in (decoder, layers):
        monkeypatch.setattr(module, "attention_dtype", lambda dtype, platform: dtype)
    backend = registry().resolve("backend", "jax", "jax")
    backend = backend(backend.Config(device="cpu", precision="bfloat16", compilation_cache=None))
    rng = np.random.default_rng(0)
    tokens, real = rng.integers(0, 37, (3, 32)).astype(np.int32), np.ones((3, 16), bool)
    rows = Sequences(tokens, np.arange(16) >= np.array([0, 5, 9])[:, None], real, real)
    (term,) = next_token_terms([rows], None, NextTokenLoss())

    def gradients():
        jax.clear_caches()
        policy = registry().resolve("policy", "decoder", "jax").load(folders[0], backend)
        return backend.learner({"policy": policy}, {"policy": OptimizerConfig()}).gradients([term])

    dense = gradients()
    assert not cudnn
    monkeypatch.setattr(attention.Fused, "takes", staticmethod(lambda a, dtype, platform: dtype == jax.numpy.bfloat16))
    fused = gradients()
    jax.clear_caches()
    assert set(cudnn) == {32}
    assert relative(fused, dense) < 0.02


@pytest.mark.parametrize("case", [name for name, (_, _, options) in CASES.items() if not {"window", "cap"} & options.keys()])
def test_torch_agrees_with_the_definition(case):
    torch = pytest.importorskip("torch")
    from lockstep_torch import attention

    numbers, kind, options = CASES[case]
    known = options.get("known", 0)
    q, k, v, d_out = (torch.tensor(array, requires_grad=True) for array in inputs(numbers, **options))
    visible = attention.causal(torch.tensor(numbers, dtype=getattr(torch, kind.__name__)), torch.float32, known)
    assert isinstance(visible, attention.Blocks)
    out = visible.attend(q, k, v)
    found = out * (d_out != 0), *torch.autograd.grad(out, (q, k, v), d_out)
    arrays = [tensor.detach().numpy() for tensor in (q, k, v, d_out)]
    for array, expected in zip(found, by_definition(*arrays[:3], numbers, arrays[3], known=known), strict=True):
        np.testing.assert_allclose(array.detach().numpy(), expected, atol=2e-5 * np.abs(expected).max())


def llama(folders, folder):
    return folders[0]


def gemma2(folders, folder):
    """Windows on every other layer and softcaps. On torch transformers' modules, which make masks of their own."""
    return written("Gemma2Config", folder, num_hidden_layers=2, sliding_window=19, attn_logit_softcapping=3.0)


def qwen3(folders, folder):
    """On torch transformers' modules, which need no mask for `lockstep_torch.attention.RealFirst`."""
    return written("Qwen3Config", folder, num_hidden_layers=2)


def written(config, folder, **changes):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    config = getattr(transformers, config)(vocab_size=37, max_position_embeddings=64, **sizes, **changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def padded_and_packed():
    rng = np.random.default_rng(0)
    draw = lambda *lengths: [rng.integers(1, 34, length).tolist() for length in lengths]  # noqa: E731
    padded = pack(draw(23, 2, 11), draw(9, 25, 18), 36, prompt_columns=23, response_columns=25)
    examples = draw(17, 23, 5, 30, 12)
    return padded, share_rows(examples, [[False] + [True] * (len(example) - 1) for example in examples], 36, 48)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("jax", gemma2), ("torch", llama), ("torch", gemma2), ("torch", qwen3)],
    ids=lambda one: getattr(one, "__name__", one),
    indirect=["backend"],
)
def test_networks_compute_long_rows_as_short_ones(kind, backend, folders, tmp_path, monkeypatch):
    """Tokens, and gradients of padded and of packed rows, with and without a mask in memory."""
    padded, packed = padded_and_packed()
    folder, seeds = kind(folders, tmp_path), np.arange(24, dtype=np.uint32).reshape(3, 8)
    policies = registry().resolve("policy", "decoder" if kind is llama else "huggingface", backend.name)
    attention, calls = importlib.import_module(f"lockstep_{backend.name}.attention"), []

    def spied(place, name):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given: calls.append(name) or real(*given))

    def found():
        policy = policies.load(folder, backend)
        drawn = policy.generate(padded.tokens[:, :23], padded.prompt_mask, seeds, temperature=1.0, stop_ids=[], pad_id=36)
        learner = backend.learner({"policy": policy}, {"policy": OptimizerConfig()})
        gradients = []
        for rows in (padded, packed):
            (term,) = next_token_terms([rows], None, NextTokenLoss())
            if rows is padded and (kind is llama or backend.name == "jax"):
                term = replace(term, dropout=Dropout(0.1, np.arange(rows.rows, dtype=np.uint32)))
            gradients.append(learner.gradients([term]))
        return drawn.tokens, gradients

    short = found()
    if backend.name == "jax":
        sys.modules["jax"].clear_caches()
    monkeypatch.setattr(attention, "PAIRS", 0)
    monkeypatch.setattr(attention, "BLOCK", 16)
    if backend.name == "jax":
        spied(attention, "in_blocks")
    else:
        spied(attention.RealFirst, "restored")
        spied(attention.Blocks, "attend")
    long = found()
    if backend.name == "jax":
        sys.modules["jax"].clear_caches()
    expected = {"in_blocks"} if backend.name == "jax" else {"restored", "attend"} if kind is llama else {"restored"}
    assert set(calls) == expected
    np.testing.assert_array_equal(long[0], short[0])
    for one, other in zip(long[1], short[1], strict=True):
        assert relative(one, other) < 1e-5
