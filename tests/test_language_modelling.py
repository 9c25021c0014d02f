"""Supervised fine-tuning and pretraining of a tiny real policy.

Expected values come from loops over tokens, from models evaluated one row at a time, or from numbers written here.
"""

from __future__ import annotations

import pytest

from conftest import CONSTANT, relative, spy
from lockstep.errors import ConfigError
from lockstep.text.sequences import pack


@pytest.fixture
def sft(make):
    return lambda **changes: make("sft", **({"batch_size": 6, "schedule": CONSTANT} | changes))


def summed_loss(policy, examples):
    """Σ -log π over each row's response, one row at a time, and the number of tokens."""
    total, count = 0.0, 0
    for prompt, response in examples:
        logprobs = policy.evaluate(pack([prompt], [response], 36), ["logprobs"])["logprobs"][0]
        total, count = total - sum(map(float, logprobs)), count + len(response)
    return total, count


def test_the_sft_loss_is_the_mean_over_response_tokens_with_eos(sft, load):
    algorithm = sft()
    batch = algorithm.batch(0)
    assert all(e.response[-1] == algorithm.tokenizer.eos_id for e in batch)
    total, count = summed_loss(load(), [(e.prompt, e.response) for e in batch])
    assert algorithm.step(0)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_with_prompt_loss_all_tokens_but_the_first_count(sft, load):
    algorithm = sft(prompt_loss=True)
    total, count = summed_loss(load(), [(e.prompt[:1], e.prompt[1:] + e.response) for e in algorithm.batch(0)])
    assert algorithm.step(0)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_held_out_loss_is_the_mean_over_all_held_out_tokens(sft, load):
    algorithm = sft(micro_batch_size=5)
    total, count = summed_loss(load(), [(e.prompt, e.response) for e in algorithm.heldout])
    assert algorithm.measure(algorithm.policy)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_without_held_out_examples_there_is_no_held_out_loss(sft):
    algorithm = sft(heldout_examples=0)
    assert algorithm.finish() == {} and "heldout/loss" not in algorithm.step(0)


def test_gradients_of_sft_do_not_depend_on_the_micro_batch(sft, monkeypatch):
    found = {}
    for size in (None, 1, 2, 4):
        algorithm = sft(micro_batch_size=size)
        calls = spy(algorithm, monkeypatch)
        algorithm.step(0)
        [(terms, _)] = calls
        found[size] = sft().learner.gradients(terms)
    for size in (1, 2, 4):
        assert relative(found[None], found[size]) < 1e-5, size


def raw(algorithm, batch):
    return [e for e in batch if e in algorithm.texts]


def test_the_pretraining_mix_is_its_fraction_of_every_batch(sft):
    algorithm = sft(batch_size=8, pretrain_mix=0.25)
    for step in range(3):
        demonstrations, texts = (term.sequences for term in algorithm.next_terms(step))
        assert (demonstrations.rows, texts.rows) == (6, 2)
    with pytest.raises(ConfigError, match="pretrain_mix=0.95 of batch_size=6 leaves no demonstration"):
        sft(pretrain_mix=0.95)


def test_with_a_pretraining_mix_one_epoch_still_shows_every_demonstration(sft):
    algorithm = sft(batch_size=4, pretrain_mix=0.25, epochs=1.0)
    seen = [e for step in range(algorithm.total_steps) for e in algorithm.batch(step)]
    assert all(e in seen for e in algorithm.examples)


def test_epochs_and_batch_size_give_the_number_of_steps(sft):
    assert [sft(epochs=e, batch_size=b).total_steps for e, b in ((1, 6), (1, 5), (0.5, 6), (0.01, 6))] == [2, 3, 1, 1]


def test_pretraining_starts_every_text_from_one_token_and_learns(make, tokenizer):
    algorithm = make("pretrain", batch_size=12, epochs=30, lengths={"prompt": 1}, schedule=CONSTANT)
    assert {tuple(e.prompt) for e in algorithm.examples} == {(tokenizer.eos_id,)}
    losses = [algorithm.step(step)["loss"] for step in range(algorithm.total_steps)]
    assert losses[-1] < 0.3 * losses[0]
    assert algorithm.finish()["heldout/loss"] == pytest.approx(losses[-1], abs=0.3)


def test_the_seed_decides_the_order_of_examples(sft):
    assert sft(seed=0).batch(0) == sft(seed=0).batch(0) != sft(seed=1).batch(0)
