"""`backend.compile` on torch: the operations between matmuls as programs, held against what they are without."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import relative  # noqa: E402
from lockstep.learning.optimisation import OptimizerConfig  # noqa: E402
from lockstep.text.sequences import Sequences  # noqa: E402
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss, next_token_terms  # noqa: E402
from lockstep_torch import backend, pieces  # noqa: E402
from lockstep_torch.policies import Decoder  # noqa: E402


@pytest.fixture
def programs(monkeypatch):
    """How often each piece was made a program. No code is generated, which takes a minute and has tests of its own in torch."""
    compiler, counts = torch.compile, {}

    def compile(function):
        def counted(graph, given):
            counts[function.__name__] = counts.get(function.__name__, 0) + 1
            return graph

        return compiler(function, backend=counted, fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(pieces, "DEVICES", set())
    torch.compiler.reset()
    for name in ("normed", "rotated", "gated", "chosen"):
        piece = pieces.joined(getattr(pieces, name).__wrapped__)
        for module in ("layers", "decoder", "model"):
            monkeypatch.setattr(f"lockstep_torch.{module}.{name}", piece, raising=False)
    yield counts
    torch.compiler.reset()


def rows(count, length):
    tokens, real = np.arange(count * length, dtype=np.int32).reshape(count, length) % 37, np.ones((count, length // 2), bool)
    return Sequences(tokens, np.arange(length // 2) >= np.arange(count)[:, None], real, real)


def made(compile):
    return backend.TorchBackend(backend.TorchBackend.Config("cpu", compile=compile, threads=1))


@pytest.mark.parametrize("count, length", [(3, 32), (5, 12)])
def test_gradients_and_tokens_are_those_of_the_pieces_as_written(folders, programs, count, length):
    def found(on):
        policy = Decoder.load(folders[0], on)
        (term,) = next_token_terms([rows(count, length)], None, NextTokenLoss())
        seeds = np.arange(count * 9, dtype=np.uint32).reshape(count, 9)
        prompts = rows(count, length)
        tokens = prompts.tokens[:, : length // 2]
        drawn = policy.generate(tokens, prompts.prompt_mask, seeds, temperature=1.0, stop_ids=[], pad_id=0)
        outputs = policy.evaluate(prompts, ["logprobs", "entropy"], temperature=0.7)
        return drawn.tokens, outputs, on.learner({"policy": policy}, {"policy": OptimizerConfig()}).gradients([term])

    tokens, outputs, gradients = found(made(False))
    assert not programs
    again = found(made(True))
    assert set(programs) == {"normed", "rotated", "gated", "chosen"}
    np.testing.assert_array_equal(again[0], tokens)
    assert relative(again[1], outputs) < 1e-5
    assert relative(again[2], gradients) < 1e-5


def test_other_numbers_of_rows_and_columns_need_no_other_program(folders, programs):
    policy = Decoder.load(folders[0], made(True))
    policy.evaluate(rows(3, 32), ["logprobs"])
    before = dict(programs)
    for count, length in ((4, 32), (4, 20), (7, 24)):
        policy.evaluate(rows(count, length), ["logprobs"])
    assert programs == before


def test_chosen_is_the_logarithm_of_softmax_and_its_entropy():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(4, 11)), np.array([3, 0, 10, 99])
    p = np.exp(logits / 0.7)
    p /= p.sum(-1, keepdims=True)
    logprobs, entropy = pieces.chosen(torch.tensor(logits), torch.tensor(tokens), 0.7, True)
    np.testing.assert_allclose(logprobs[:3], np.log(p[np.arange(3), tokens[:3]]), rtol=1e-5)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 8), (4, 8), (2, 1, 3, 8)])
def test_rms_norm_and_its_gradients_are_those_of_the_definition(shape):
    rng = np.random.default_rng(0)
    x, weight, slope = (torch.tensor(rng.normal(size=size), requires_grad=True) for size in (shape, shape[-1:], shape))

    def by_definition(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    expected, found = by_definition(x, weight), pieces.rms_norm(x, weight, 1e-3)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(y, (x, weight), slope) for y in (found, expected)]
    torch.testing.assert_close(*slopes)
    with torch.no_grad():
        torch.testing.assert_close(pieces.rms_norm(x, weight, 1e-3), expected)
    part = x.float()[..., 1:, :] if len(shape) == 3 else x.float()
    low = pieces.normed(part, weight.float(), 1e-3, torch.bfloat16)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), by_definition(part.double(), weight), atol=0, rtol=2**-7)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 1, 1, 4)])
def test_a_rotation_is_that_of_complex_numbers_and_its_gradient_the_one_back(shape):
    rng = np.random.default_rng(0)
    rows, heads, length, size = shape
    x, slope = (rng.normal(size=(rows, length, heads, size)).astype(np.float32).swapaxes(1, 2) for _ in range(2))
    angle = rng.normal(size=(rows, 1, length, size // 2)).astype(np.float32)

    def turned(x, angle):
        found = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angle)
        return np.concatenate([found.real, found.imag], axis=-1)

    tensor, cos, sin = torch.tensor(x, requires_grad=True), torch.tensor(np.cos(angle)), torch.tensor(np.sin(angle))
    found = pieces.rotated(tensor, cos, sin, torch.float32)
    (back,) = torch.autograd.grad(found, tensor, torch.tensor(slope))
    np.testing.assert_allclose(found.detach(), turned(x, angle), atol=1e-6)
    np.testing.assert_allclose(back, turned(slope, -angle), atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(pieces.rotated(tensor, cos, sin, torch.float32), turned(x, angle), atol=1e-6)
