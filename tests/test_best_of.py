"""The best of n samples as an evaluated policy: what the evaluation samples, scores and reports. The estimators are tested in
test_numerics.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conftest import Data, Scored
from lockstep.config.schema import parse
from lockstep.interfaces import Generated
from lockstep.runs.evaluation import EvaluationConfig, Evaluator, overoptimisation


class Draws:
    """A policy of three words, each drawn by its first seed alone."""

    def __init__(self):
        self.rows = []

    def generate(self, tokens, mask, seeds, *, temperature, stop_ids, pad_id):
        self.rows.append(len(seeds))
        written = np.full(seeds.shape, pad_id, np.int32)
        written[:, 0], written[:, 1] = seeds[:, 0] % 3 + 1, stop_ids[0]
        real = np.zeros(seeds.shape, bool)
        real[:, :2] = True
        return Generated(written, real, np.zeros(seeds.shape, np.float32))


class Known(Data):
    def gold(self, prompt, text):
        return {"gold": -float(text.strip()[1:])}


def measured(tokenizer, best_of=8, batch_size=20, function=lambda r: r.sequences.responses[:, 0], data=None, **changes):
    settings = {"lengths": {"prompt": 6, "response": 4, "multiple": 1}, "best_of": best_of, "batch_size": batch_size, **changes}
    reward_model, policy = Scored(function), Draws()
    evaluator = Evaluator(parse(EvaluationConfig, settings, "evaluation"), data or Known(), tokenizer, reward_model, 0)
    return evaluator.best_of(policy, *evaluator.prompts("heldout")), policy.rows


def test_every_n_is_measured_from_one_set_of_samples_and_duplicates_are_kept(tokenizer):
    """Words 1, 2, 3 with probability 1/3 each: the best of n is 3 - (2/3)^n - (1/3)^n on average."""
    found, rows = measured(tokenizer, best_of=64, batch_size=64)
    assert rows == [64] * 12
    for n in (1, 2, 4, 64):
        score, gold, kl = (found[f"best_of_{n}/{name}"] for name in ("score", "gold", "kl"))
        assert score["mean"] == pytest.approx(3 - (2 / 3) ** n - (1 / 3) ** n, abs=0.12)
        assert gold["mean"] == pytest.approx(-score["mean"]) and score["n"] == 12 and gold["low"] <= gold["mean"] <= gold["high"]
        shares = [(k / 3) ** n - ((k - 1) / 3) ** n for k in (1, 2, 3)]
        assert kl["mean"] == pytest.approx(sum(p * math.log(3 * p) for p in shares), abs=0.05)
        assert found[f"best_of_{n}/kl_bound"]["mean"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_the_samples_do_not_depend_on_how_many_prompts_are_drawn_at_a_time(tokenizer):
    (found, rows), (others, more) = measured(tokenizer), measured(tokenizer, batch_size=3)
    assert found == others
    assert rows == [16] * 6 and set(more) == {3}  # no more rows at a time than batch_size
    assert measured(tokenizer, best_of=0) == ({}, [])


def test_samples_without_a_score_are_left_out(tokenizer):
    found, _ = measured(tokenizer, function=lambda r: np.where(r.sequences.responses[:, 0] == 1, np.nan, 1.0))
    assert found["best_of_1/score"] == {"mean": 1, "low": 1, "high": 1, "n": 12}
    assert 0 < found["best_of_4/score"]["n"] < 12 and "best_of_8/kl_bound" not in found  # no prompt has eight


def test_each_sample_is_scored_once(tokenizer):
    seen = []
    measured(tokenizer, function=lambda r: seen.append(len(r.texts)) or np.arange(len(r.texts)))
    assert sum(seen) == 8 * 12


def test_the_form_of_overoptimisation_is_fitted_and_tried_out_of_sample():
    """Gold that follows the form with α = 2, β = 1: the form, fitted up to n = 4, meets n = 16, and the line overshoots."""
    d = {n: math.sqrt(math.log(n) - (n - 1) / n) for n in (1, 2, 4, 8, 16)}
    found = overoptimisation({n: 5 + x * (2 - x) for n, x in d.items()})
    assert (found["best_of/alpha"], found["best_of/beta"]) == pytest.approx((2, 1), abs=1e-9)
    assert found["best_of/form_error"] == pytest.approx(0, abs=1e-9)
    slope = sum(d[n] ** 2 * (2 - d[n]) for n in (2, 4)) / (d[2] ** 2 + d[4] ** 2)
    assert found["best_of/line_error"] == pytest.approx(d[16] * (slope - (2 - d[16])), abs=1e-9)


def test_too_few_samples_and_unknown_gold_fit_nothing(tokenizer):
    assert overoptimisation({1: 5.0, 2: 5.1, 4: 5.2, 8: 5.3}) == overoptimisation({}) == {}
    assert "best_of/alpha" in measured(tokenizer, best_of=16, batch_size=64)[0]
    assert "best_of/alpha" not in measured(tokenizer, best_of=16, batch_size=64, data=Data())[0]
