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
        for module in ("decoder", "model"):
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
