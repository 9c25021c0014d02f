"""What evaluations say of length: win rates at equal length, and whether labelers and a reward model prefer the longer."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from conftest import Data, Scored
from lockstep.config.schema import parse
from lockstep.interfaces import Generated
from lockstep.learning import numerics
from lockstep.runs.evaluation import EvaluationConfig, Evaluator
from lockstep.runs.reward_model_accuracy import measure_reward_model
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import right_pad
from lockstep.types import Comparison

STOP = 35
LENGTHS = {"prompt": 6, "response": 8, "multiple": 1}


class Writes:
    """A policy whose response to prompt i is ``written[i]``."""

    vocab_size = 37

    def __init__(self, *written):
        self.written = written

    def generate(self, tokens, mask, seeds, *, temperature, stop_ids, pad_id):
        written, real = right_pad([[*row, STOP] for row in self.written], pad_id, seeds.shape[1])
        return Generated(written, real, np.zeros(written.shape, np.float32))


def measured(tokenizer, reward_model, ours, theirs):
    config = parse(EvaluationConfig, {"lengths": LENGTHS}, "evaluation")
    evaluator = Evaluator(config, Data(), tokenizer, reward_model, 0)
    prompts, ids = Data().prompts("heldout")[: len(ours)], [[1]] * len(ours)
    return evaluator.measure(*(evaluator.answer(Writes(*written), prompts, ids) for written in (ours, theirs)))


def test_a_policy_that_wins_by_length_alone_is_seen_to(tokenizer):
    """It writes more on eight prompts of twelve, and the reward model counts tokens."""
    ours = [[1] * n for n in (3, 4, 5, 6, 6, 5, 4, 3, 1, 1, 2, 2)]
    theirs = [[2] * n for n in (2, 2, 2, 2, 4, 4, 2, 2, 3, 4, 3, 4)]
    found = measured(tokenizer, Scored(), ours, theirs)
    assert found["win_rate"]["mean"] == pytest.approx(8 / 12)
    controlled = found["length_controlled_win_rate"]
    wins, longer = (
        [float(len(a) > len(b)) for a, b in zip(ours, theirs, strict=True)],
        [len(a) - len(b) for a, b in zip(ours, theirs, strict=True)],
    )
    rate, low, high = numerics.length_controlled_win_rate(np.array(wins), np.array(longer))
    assert (controlled["mean"], controlled["low"], controlled["high"], controlled["n"]) == (rate, low, high, 12)
    assert low < 0.5 < high and abs(rate - 0.5) < 0.15


def test_pairs_without_a_score_are_left_out_of_both_win_rates(tokenizer):
    ours, theirs = [[1, 1], [1, 1, 1], [1]], [[2], [2], [2, 2]]
    scores = iter([[5.0, float("nan"), 5.0], [4.0, 4.0, 4.0]])
    found = measured(tokenizer, Scored(lambda responses: next(scores)), ours, theirs)
    assert found["win_rate"]["n"] == found["length_controlled_win_rate"]["n"] == 2 and found["win_rate"]["mean"] == 1


def test_a_policy_that_is_always_longer_has_no_win_rate_at_equal_length(tokenizer):
    found = measured(tokenizer, Scored(), [[1, 1], [1, 1]], [[2], [2]])
    assert found["win_rate"]["mean"] == 1 and "length_controlled_win_rate" not in found


def test_how_often_labelers_and_a_reward_model_prefer_the_longer(tokenizer):
    """Over each comparison's pairs of unequal length, then over comparisons."""
    judged = measure_reward_model(Scored(), Data(), tokenizer, Lengths(**LENGTHS), 12, None)
    assert judged["prefers_longer/reward_model"]["mean"] == 1 and judged["prefers_longer/reward_model"]["n"] == 12
    shares = []
    for comparison in Data().comparisons("heldout"):
        pairs = []
        for i, j in combinations(range(len(comparison.ranks)), 2):
            words = [len(comparison.completions[k].split()) for k in (i, j)]
            if words[0] != words[1]:
                longer, shorter = (i, j) if words[0] > words[1] else (j, i)
                ahead = comparison.ranks[shorter] - comparison.ranks[longer]
                pairs.append(0.5 if ahead == 0 else float(ahead > 0))
        shares.append(np.mean(pairs))
    assert judged["prefers_longer/labelers"]["mean"] == pytest.approx(np.mean(shares)) and 0.2 < np.mean(shares) < 0.8


def test_completions_of_one_length_say_nothing_about_length(tokenizer):
    class Even(Data):
        def comparisons(self, split):
            return [Comparison(prompt, ("w1 w2", "w3 w4"), (0, 1)) for prompt in self.prompts(split)]

    judged = measure_reward_model(Scored(), Even(), tokenizer, Lengths(**LENGTHS), 12, None)
    assert "accuracy/training_labelers" in judged and not [name for name in judged if "longer" in name]


def test_what_is_of_no_split_stands_with_the_held_out_one_wherever_it_is_named(tokenizer, load):
    """`lockstep compare` reads it there."""
    config = parse(
        EvaluationConfig, {"lengths": LENGTHS, "splits": ["adversarial", "heldout"], "policies": ["sft"]}, "evaluation"
    )
    splits = Evaluator(config, Data(), tokenizer, Scored(), 0).run(lambda name: load(), ["sft"], lambda what: None)["splits"]
    assert "text_loss" in splits["heldout"]["sft"] and "text_loss" not in splits["adversarial"]["sft"]
