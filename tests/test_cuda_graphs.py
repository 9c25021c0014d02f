"""Generation by CUDA graphs, as far as a CPU goes: `Tape` stands in for the card's recorder, and keeps its rules."""

import weakref
from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from lockstep_torch import backend, decoder, generation  # noqa: E402
from lockstep_torch.policies import Decoder  # noqa: E402

aten = torch.ops.aten
ON_THE_HOST = {aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten._unique2, aten.lift_fresh}
"""Operators that wait for a number, or bring one, which a card refuses while it records: those that one would slip into a step.
Copies from the host are not seen on a CPU."""


class Tape(TorchDispatchMode):
    """What a CUDA graph does with a step. Recording runs nothing. A replay runs the same operators on the same tensors, and with
    the numbers of Python that they had then; a tensor from outside that is gone by then is an error."""

    def __init__(self, step: Callable[[], None]):
        super().__init__()
        self.calls, self.before, self.inside, self.replays = [], {}, [], 0
        with self:
            step()
        for tensor, value in self.before.values():
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        if operator.overloadpacket in ON_THE_HOST:
            raise RuntimeError(f"{operator} is not permitted while recording")
        named = named or {}
        own = {id(tensor) for tensor in self.inside}

        def kept(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
            if id(tensor) in own:
                return lambda: tensor
            self.before.setdefault(id(tensor), (tensor, tensor.clone()))
            return weakref.ref(tensor)

        given = tree_map_only(torch.Tensor, kept, (arguments, named))
        found = operator(*arguments, **named)
        results = [tensor for tensor in torch.utils._pytree.tree_leaves(found) if isinstance(tensor, torch.Tensor)]
        outside = {id(tensor) for tensor, _ in self.before.values()}
        results = [None if id(tensor) in outside else tensor for tensor in results]  # what is written in place is not kept alive
        self.inside += [tensor for tensor in results if tensor is not None]
        self.calls.append((operator, given, results))
        return found

    def replay(self) -> None:
        self.before.clear()
        self.replays += 1

        def alive(kept: Callable[[], torch.Tensor]) -> torch.Tensor:
            tensor = kept()
            if tensor is None:
                raise RuntimeError("a tensor that the graph reads is gone")
            return tensor

        for operator, given, results in self.calls:
            arguments, named = torch.utils._pytree.tree_map(lambda x: alive(x) if callable(x) else x, given)
            with torch.autocast("cpu", enabled=False):  # what it would cast is cast
                again = operator(*arguments, **named)
            for old, new in zip(results, torch.utils._pytree.tree_leaves(again), strict=True):
                if old is not None and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """All that are recorded in a test."""
    found = []

    def recorded(step, device):
        found.append(Tape(step))
        return found[-1].replay

    monkeypatch.setattr(generation, "recorded", recorded)
    return found


def policy(folder, precision="float32"):
    return Decoder.load(folder, backend.TorchBackend(backend.TorchBackend.Config("cpu", precision, False, False, threads=1)))


def drawn(policy, steps=12, stop_ids=(), temperature=1.0):
    """Of three prompts, the first padded on the left."""
    tokens, seeds = np.arange(12, dtype=np.int32).reshape(3, 4) % policy.vocab_size, np.arange(3 * steps, dtype=np.uint32)
    mask = np.ones((3, 4), bool)
    mask[0, :2] = False
    return policy.generate(tokens, mask, seeds.reshape(3, steps), temperature=temperature, stop_ids=list(stop_ids), pad_id=0)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_replayed_step_draws_what_the_step_draws(folders, precision, temperature, tapes, monkeypatch):
    model = policy(folders[0], precision)
    model.network.replays = True
    found = drawn(model, temperature=temperature)
    assert [tape.replays for tape in tapes] == [12 - generation.WARM_UP]
    monkeypatch.setattr(generation, "recorded", lambda step, device: step)
    assert_same(found, drawn(model, temperature=temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_replayed_step_draws_what_the_loop_draws(folders, temperature, tapes):
    """The loop reads the filled columns alone. In float32: in bfloat16 a kernel may round sums of more columns otherwise."""
    model = policy(folders[0])
    expected = drawn(model, temperature=temperature)
    model.network.replays = True
    assert_same(drawn(model, temperature=temperature), expected)
    assert [tape.replays for tape in tapes] == [12 - generation.WARM_UP]


def test_replays_end_when_all_rows_have_stopped(folders, tapes):
    model = policy(folders[0])
    free = drawn(model).tokens
    stops = set(free[:, 6].tolist())
    expected = drawn(model, stop_ids=stops)
    length = int(expected.mask.sum(1).max())
    assert generation.WARM_UP < length < 12
    model.network.replays = True
    found = drawn(model, stop_ids=stops)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert tapes[0].replays == length - generation.WARM_UP


def test_nothing_is_recorded_for_few_tokens_or_without_the_setting(folders, tapes):
    model = policy(folders[0])
    drawn(model)
    model.network.replays = True
    drawn(model, steps=generation.WARM_UP)
    assert not tapes


class Looks(decoder.DecoderNetwork):
    def advance(self, token, cache):
        assert cache.count.max().item() >= 0
        return super().advance(token, cache)


class Drops(decoder.DecoderNetwork):
    def advance(self, token, cache):
        cache.count = cache.count.clone()
        return super().advance(token, cache)


class WritesAndDrops(decoder.DecoderNetwork):
    def advance(self, token, cache):
        hidden = super().advance(token, cache)
        cache.count = cache.count.clone()
        return hidden


class StartsAgain(decoder.DecoderNetwork):
    def advance(self, token, cache):
        cache.before, cache.count = cache.count, cache.count.clone()  # what a replay reads is there, and never changed
        return super().advance(token, cache)


@pytest.mark.parametrize("wrong, message", [(Looks, "not permitted"), (Drops, "is gone"), (WritesAndDrops, "is gone")])
def test_the_stand_in_refuses_what_a_card_would_and_reads_nothing_that_is_gone(folders, tapes, wrong, message):
    model = policy(folders[0])
    model.network.replays, model.network.__class__ = True, wrong
    with pytest.raises(RuntimeError, match=message):
        drawn(model)


def test_the_stand_in_does_not_run_python_again(folders, tapes):
    model = policy(folders[0])
    expected = drawn(model)
    model.network.replays, model.network.__class__ = True, StartsAgain
    assert np.abs(drawn(model).logprobs - expected.logprobs).max() > 1e-3


def test_the_setting_is_of_no_effect_on_a_cpu(folders):
    made = backend.TorchBackend(backend.TorchBackend.Config("cpu", "float32", False, cuda_graphs=True, threads=1))
    assert not Decoder.load(folders[0], made).network.replays
