"""Several examples in one row: every number is that of the same examples in rows of their own, and nothing leaks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from conftest import CONSTANT, configure, relative, spy
from lockstep.errors import ConfigError
from lockstep.registry import registry
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences, first_fit, pack, share_rows

PAD = 36
EXAMPLES = [Example([5, 1], [2, 3, 35]), Example([7], [8, 35]), Example([4, 4, 9], [6, 1, 30, 35])]


def test_examples_share_rows_with_their_prompts_uncounted():
    rows = share_rows([[1, 2, 3], [4, 5], [6, 7, 8, 9]], [[False, True, True], [True, True], [False] * 2 + [True] * 2], 99, 6)
    assert rows.tokens.tolist() == [[6, 7, 8, 9, 4, 5], [1, 2, 3, 99, 99, 99]]
    assert rows.segments.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert rows.prompt_mask.tolist() == [[True], [True]]
    assert rows.responses[rows.mask].tolist() == [8, 9, 5, 2, 3]  # not 4: nothing before it predicts it
    assert rows.response_mask.sum() == 7 and rows.longest == 4


def test_the_longest_examples_are_placed_first_and_no_row_overflows():
    assert first_fit([3, 7, 5, 1, 4], 10) == [[1, 0], [2, 4, 3]]
    lengths = np.random.default_rng(0).integers(1, 31, 500).tolist()
    bins = first_fit(lengths, 48)
    assert sorted(item for items in bins for item in items) == list(range(500))
    assert max(sum(lengths[i] for i in items) for items in bins) <= 48
    assert len(bins) <= 1.05 * sum(lengths) / 48


def test_rows_of_packed_batches_come_in_few_numbers(tokenizer):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(100):
        examples = [Example([1] * n, [2] * n) for n in rng.integers(1, 7, 64)]
        rows = encoding.packed_block(examples, tokenizer, Lengths(6, 12, 4), rows_multiple=None)
        needed = int((rows.mask.any(axis=1)).sum())
        assert needed <= rows.rows <= 1.125 * needed + 1
        seen.add(rows.rows)
    assert len(seen) <= 8  # and not as many as there are needs
    assert encoding.packed_block(examples, tokenizer, Lengths(6, 12, 4), rows_multiple=7).rows % 7 == 0


def both(make, name, monkeypatch, **changes):
    """(terms, metrics) of the first step without and with packing."""
    found = []
    for packing in (False, True):
        algorithm = make(name, packing=packing, schedule=CONSTANT, batch_size=8, heldout_examples=0, **changes)
        calls = spy(algorithm, monkeypatch)
        metrics = algorithm.step(0)
        found.append((calls[0][0], metrics))
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sft", {"micro_batch_size": 2, "pretrain_mix": 0.25}),
        ("sft", {"prompt_loss": True}),
        ("pretrain", {"micro_batch_size": 2}),
    ],
    ids=["mix", "prompt_loss", "pretrain"],
)
def test_loss_and_gradients_are_those_of_rows_of_their_own(make, monkeypatch, name, changes):
    (plain, before), (packed, after) = both(make, name, monkeypatch, **changes)
    fresh = make(name).learner
    assert relative(fresh.gradients(plain), fresh.gradients(packed)) < 1e-5
    for metric in ("loss", "perplexity", "grad_norm/policy"):
        assert after[metric] == pytest.approx(before[metric], rel=1e-5), metric
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-6)
    count = lambda terms: sum(int(term.sequences.mask.sum()) for term in terms)  # noqa: E731
    assert count(packed) == count(plain)
    rows = sum(term.sequences.rows for term in packed)
    assert after["rows"] == rows < sum(term.sequences.rows for term in plain)


def shared(examples) -> Sequences:
    tokens = [e.prompt + e.response for e in examples]
    return share_rows(tokens, [[False] * len(e.prompt) + [True] * len(e.response) for e in examples], PAD, 18)


def of_segment(array, rows, number):
    return array[(rows.segments[:, 1:] == number) & rows.mask]


def check_apart(policy):
    """Outputs of three examples in one row: as alone, and not a bit of one depends on another's tokens."""
    rows, outputs = shared(EXAMPLES), ["logprobs", "entropy"]
    assert rows.rows == 1
    found = policy.evaluate(rows, outputs)
    for name in outputs:
        for number, example in enumerate(sorted(EXAMPLES, key=lambda e: -len(e.prompt + e.response)), 1):
            alone = policy.evaluate(pack([example.prompt], [example.response], PAD), [name])[name][0]
            np.testing.assert_allclose(of_segment(found[name], rows, number), alone, atol=2e-5)
    for changed in (1, 2, 3):
        tokens = np.where(rows.segments == changed, 33 - rows.tokens % 34, rows.tokens).astype(np.int32)
        other = policy.evaluate(dataclasses.replace(rows, tokens=tokens), outputs)
        for name in outputs:
            assert not np.array_equal(of_segment(other[name], rows, changed), of_segment(found[name], rows, changed))
            for number in {1, 2, 3} - {changed}:
                np.testing.assert_array_equal(of_segment(other[name], rows, number), of_segment(found[name], rows, number))


def test_no_bit_of_an_example_depends_on_the_others_in_its_row(load):
    check_apart(load())


def gpt2(folder):
    """Positions are learned, and end sooner than a row does."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)


def test_learned_positions_start_again_in_every_example(backend, tmp_path):
    gpt2(tmp_path)
    check_apart(registry().resolve("policy", "huggingface", backend.name).load(tmp_path, backend))


def test_a_network_of_transformers_that_cannot_pack_is_refused():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from lockstep_torch.transformers_network import TransformersNetwork

    sizes = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    opt = transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)
    network = TransformersNetwork(transformers.AutoModelForCausalLM.from_config(opt).eval())
    rows = shared(EXAMPLES)
    with pytest.raises(ConfigError, match="This opt cannot be trained on packed rows: .* Set packing=false."):
        network.hidden(torch.as_tensor(rows.tokens).long(), torch.as_tensor(rows.segments).long())


def test_sliding_windows_count_within_an_example(backend, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=37, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=32, sliding_window=3,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check_apart(registry().resolve("policy", "huggingface", backend.name).load(tmp_path, backend))


def test_packing_and_dropout_do_not_go_together():
    with pytest.raises(ConfigError, match="sft.packing=true does not work with sft.dropout=0.2"):
        configure("sft", packing=True, dropout=0.2)


def test_the_arithmetic_says_what_a_packed_row_holds(make):
    algorithm = make("sft", packing=True, batch_size=6, micro_batch_size=2)
    line = algorithm.arithmetic(algorithm.config, algorithm.context.data)
    assert line == "12 examples x 1 epochs / 6 per step = 2 steps, packed into rows of 18 tokens; micro-batches of 2 rows"


def test_sequences_without_segments_are_as_they_were():
    rows = pack([[1], [2, 3]], [[4, 5], [6]], PAD)
    assert rows.segments is None and rows.take(slice(0, 1)).segments is None
    assert rows.attention.dtype == bool and rows.longest == 3
