"""Evaluation of policies and reward models on held-out prompts and comparisons, with 95% intervals.

Every policy answers the same prompts from the same seeds and takes the tests of the data source. Gold scores need a data source
that knows them (the miniature does). Win rates compare by gold score if known, else by the reward model's score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, MissingData, listing, short
from lockstep.interfaces import DataSource, Environment, Policy, RewardModel
from lockstep.learning import numerics
from lockstep.learning.episodes import offered
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler, Samples, neighbours, score
from lockstep.learning.served import Served
from lockstep.runs.likelihood import Likelihood, logprobs
from lockstep.runs.measures import Measure, clusters_of, mean, proportion
from lockstep.runs.reward_model_accuracy import measure_reward_model
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import chunks
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Fit, Prompt


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation measures. No count exceeds the size of its split."""

    policies: tuple[str, ...] | None = setting(
        None, "Stages or folders whose policies to evaluate, or 'new', the configured one; null: all that stages train."
    )
    baseline: str = setting("sft", "The stage that win rate and KL refer to.")
    splits: tuple[str, ...] = setting(
        ("heldout", "adversarial"),
        "Splits of the data source's prompts, and stages that attack: their attacks on held-out goals.",
    )
    judges: Mapping[str, Mapping[str, Any]] = setting(
        {}, "Reward models by names you choose: each one's mean score is a measure of that name."
    )
    prompts: int = setting(500, "Prompts per split.", least=1)
    comparisons: int = setting(300, "Held-out comparisons on which to test the reward model.", least=0)
    texts: int = setting(200, "Held-out raw texts for ``text_loss``.", least=0)
    samples: int = setting(12, "Rows in the table of samples, per policy and split, spread over its prompts.", least=0)
    temperature: float = setting(1.0, "For sampling and KL; 0 takes the most likely token, with KL at 1.", least=0)
    best_of: int = setting(0, "N: each policy's best of 1, 2, 4, ..., N samples by the reward model; 0: not measured.", least=0)
    batch_size: int = setting(100, "Responses per forward pass.", least=1)
    lengths: Lengths = setting(Lengths(), "Limits in tokens.")
    stop_strings: tuple[str, ...] = setting((), "Text that ends a response, as EOS does; or special tokens by name.")

    def __post_init__(self) -> None:
        if wrong := [name for name in self.judges if not re.fullmatch(r"[a-z]\w*", name) or name in _MEASURES | _COLUMNS]:
            raise ConfigError(
                f"evaluation.judges has '{short(wrong[0])}'. Name a judge with small letters, digits and _, and not as a measure "
                f"or column there is: {listing(_MEASURES | _COLUMNS)}."
            )
        if self.best_of and not self.temperature:
            raise ConfigError("evaluation.best_of needs samples that differ, and evaluation.temperature=0 draws one. Raise it.")

    def arithmetic(self, data: DataSource) -> str:
        """A one-line summary of the evaluation.

        Raises:
          ConfigError: a test of the data has the name of a measure or of a judge.
          DataError: the data have no such split, or no prompts in any of them.
        """
        if wrong := [name for name in data.tests() if name in _MEASURES | set(self.judges)]:
            raise ConfigError(f"The data have a test '{short(wrong[0])}', which is a measure of evaluations. Name it otherwise.")
        counts = {split: min(len(found), self.prompts) for split in self.splits if (found := prompts_of(data, split))}
        if not counts:
            raise MissingData(f"No prompts to evaluate on in the splits {', '.join(self.splits) or '(none given)'}.")
        best = f", and the best of {self.best_of} samples for each" if self.best_of else ""
        where = " and ".join(f"{n} {split} prompts" for split, n in counts.items())
        return f"{', '.join(self.policies or ())} on {where}{best}"


_MEASURES = frozenset(
    ("gold", "score", "turns", "win_rate", "length_controlled_win_rate", "length", "finished", "kl", "sampler_mismatch")
    + ("text_loss", "gain")
)
_COLUMNS = frozenset(("policy", "split", "prompt", "response"))
"""Of the table of samples, beside the scores."""


@dataclass(frozen=True)
class Answers:
    """A policy's responses to the prompts of one split. ``clusters`` int [N]: responses to the same prompt are not independent,
    whatever an environment then says to each."""

    samples: Samples
    clusters: np.ndarray
    gold: dict[str, np.ndarray]
    scores: np.ndarray | None
    details: Mapping[str, np.ndarray]
    judged: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def preference(self) -> np.ndarray | None:
        return self.gold["gold"] if self.gold else self.scores

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, in episodes of all its turns."""
        return self.samples.sequences.mask.sum(axis=1)


@dataclass
class Evaluator:
    """Evaluates policies one at a time against one baseline.

    ``load`` returns the policy of a stage. The baseline stays loaded; the others are released.
    """

    config: EvaluationConfig
    data: DataSource
    tokenizer: Tokenizer
    reward_model: RewardModel | None
    seed: int
    environment: Environment | None = None
    judges: Mapping[str, RewardModel] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    """{policy: the one of the previous round}."""
    labelers: Collection[str | None] | None = None
    """Those that the reward model was trained on, None for unnamed ones; None: it may be any."""
    fits: dict[str, Fit] = field(default_factory=dict)
    engine: Served | None = None

    def run(self, load: Callable[[str], Policy], policies: Sequence[str], progress: Callable[[str], None]) -> dict[str, Any]:
        c = self.config
        prompts = {split: self.prompts(split) for split in c.splits}
        prompts = {split: found for split, found in prompts.items() if found[0]}
        main = "heldout" if "heldout" in prompts else next(iter(prompts), None)
        progress(c.baseline)
        baseline = load(c.baseline)
        reference = {split: self.answer(baseline, *found) for split, found in prompts.items()}
        splits: dict[str, dict[str, Any]] = {split: {} for split in prompts}
        samples = []
        found_by: dict[tuple[str, str], Answers] = {}
        for name in policies:
            progress(name)
            policy = baseline if name == c.baseline else load(name)
            general = self.likelihood.tests(policy) | self.likelihood.text_loss(policy)
            for split, found in prompts.items():
                answers = reference[split] if name == c.baseline else self.answer(policy, *found)
                measures = self.measure(answers, reference[split]) | self.kl(policy, baseline, answers)
                measures |= self.best_of(policy, *found) | gain(answers, found_by.get((self.follows.get(name, ""), split)))
                found_by[name, split] = answers
                splits[split][name] = measures | (general if split == main else {})
                samples += [{"policy": name, "split": split, **row} for row in rows(answers, c.samples)]
        result = {"baseline": c.baseline, "splits": splits, "samples": samples}
        if self.reward_model is not None:
            progress("reward model")
            result["reward_model"] = measure_reward_model(
                self.reward_model, self.data, self.tokenizer, c.lengths, c.comparisons, self.labelers
            )
        return result

    # ------------------------------------------------------------------------------------------------------ policies

    def prompts(self, split: str) -> tuple[list[Prompt], list[list[int]]]:
        found = prompts_of(self.data, split)[: self.config.prompts]
        if not found:
            return [], []
        fit = self.fits[f"{split} prompts"] = Fit(f"{split} prompts")
        return encoding.encode_prompts(self.tokenizer, offered(self.environment, found), self.config.lengths, fit)

    @cached_property
    def sampler(self) -> Sampler:
        c = self.config
        return Sampler(
            Stops(self.tokenizer, c.stop_strings), c.lengths, c.temperature, c.batch_size, self.environment, self.engine
        )

    @cached_property
    def likelihood(self) -> Likelihood:
        c = self.config
        return Likelihood(self.data, self.tokenizer, c.lengths, c.batch_size, c.texts, self.fits)

    def answer(self, policy: Policy, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> Answers:
        return self.judged(policy, prompts, ids, token_seeds(self.seed, "evaluation", 0, len(ids), self.config.lengths.response))

    def judged(self, policy: Policy, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], seeds: np.ndarray) -> Answers:
        """Sample a response for each row of seeds, with its gold, reward-model and judges' scores."""
        samples = self.sampler.sample(policy, prompts, ids, seeds)
        responses = samples.responses
        golds = [self.data.gold(prompt, text) for prompt, text in zip(responses.prompts, responses.texts, strict=True)]
        known = bool(golds) and golds[0] is not None
        gold = {name: np.array([g[name] for g in golds]) for name in golds[0]} if known else {}
        scores, details = (None, {}) if self.reward_model is None else score(self.reward_model, samples)
        judged = {name: score(judge, samples)[0] for name, judge in self.judges.items()}
        clusters = clusters_of(neighbours(prompts, len(seeds) // len(prompts)))
        return Answers(samples, clusters, gold, scores, details, judged)

    def measure(self, answers: Answers, reference: Answers) -> dict[str, Measure]:
        found = dict(answers.gold)
        if answers.scores is not None:
            found["score"] = answers.scores
            found |= {f"reward_model/{name}": values for name, values in answers.details.items()}
        found |= answers.judged
        if answers.samples.responses.rewards is not None:
            found["turns"] = numerics.turns(answers.samples.sequences.mask)
        measures = {name: mean(values, answers.clusters) for name, values in found.items()}
        if answers.preference is not None:
            longer = answers.lengths - reference.lengths
            measures |= win_rates(answers.preference - reference.preference, longer, answers.clusters)
        measures["length"] = mean(answers.lengths, answers.clusters)
        measures["finished"] = proportion(answers.samples.finished, answers.clusters)
        return measures

    def kl(self, policy: Policy, baseline: Policy, answers: Answers) -> dict[str, Measure]:
        """KL(policy || baseline) per response, in nats: k1 summed over the tokens of the policy's own samples. If an engine drew
        them, also the mean absolute difference between its log-probabilities of the tokens and the policy's."""
        sequences = answers.samples.sequences
        here, there = (
            logprobs(model, sequences, self.config.temperature or 1.0, self.config.batch_size) for model in (policy, baseline)
        )
        found = {"kl": mean(numerics.k1(here, there, sequences.mask).sum(axis=1), answers.clusters)}
        if self.engine is not None:
            found["sampler_mismatch"] = mean(np.abs(here - answers.samples.logprobs)[sequences.mask])
        return found

    def best_of(self, policy: Policy, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> dict[str, Measure]:
        """Measures of the best of n samples by the reward model: score, gold score, KL to the policy in nats, and the bound on
        this KL. They are estimated for n = 1, 2, 4, ..., N from the same N samples of each prompt.

        Prompts are sampled together until they fill ``batch_size``; the grouping does not change a prompt's samples. Samples
        without a score are left out, and so are prompts with fewer than n scored samples.
        """
        most, columns = self.config.best_of, self.config.lengths.response
        sizes, found = numerics.best_of_sizes(most), dict[str, list[tuple[float, int]]]()
        clusters = clusters_of(prompts)
        for part in chunks(len(ids), max(1, self.config.batch_size // most)) if most else ():
            seeds = [token_seeds(self.seed, "best of", i, most, columns) for i in range(part.start, part.stop)]
            answers = self.judged(policy, prompts[part], ids[part], np.concatenate(seeds))
            if (scores := answers.scores) is None:
                return {}
            values = {"score": scores} | ({"gold": answers.gold["gold"]} if answers.gold else {})
            for start in range(0, len(scores), most):
                prompt = clusters[part.start + start // most]
                rows = start + np.flatnonzero(np.isfinite(scores[start : start + most]))
                for n in (n for n in sizes if n <= len(rows)):
                    odds = numerics.best_of(scores[rows], n)
                    best = {name: float(odds @ x[rows]) for name, x in values.items()}
                    for name, value in (best | {"kl": numerics.best_of_kl(scores[rows], n)}).items():
                        found.setdefault(f"best_of_{n}/{name}", []).append((value, prompt))
        measures = {name: mean(*np.array(each).T) for name, each in found.items()}
        known = [n for n in sizes if f"best_of_{n}/kl" in measures]
        measures |= {f"best_of_{n}/kl_bound": {"mean": numerics.best_of_kl_bound(n), "n": len(ids)} for n in known}
        gold = {n: measures[f"best_of_{n}/gold"]["mean"] for n in known if f"best_of_{n}/gold" in measures}
        return measures | {name: {"mean": value, "n": len(ids)} for name, value in overoptimisation(gold).items()}


def overoptimisation(gold: Mapping[int, float]) -> dict[str, float]:
    """How gold follows the KL of the best of n: α and β of `lockstep.learning.numerics.overoptimisation` over all n; and, fitted
    up to a quarter of the largest n, how far that form and a line miss its gain. Empty if there are too few n to fit.

    Args:
      gold: {n: mean gold score of the best of n}, ascending from n = 1.
    """
    sizes = list(gold)[1:]
    fitted = [n for n in sizes if 4 * n <= sizes[-1]] if sizes else []
    if len(fitted) < 2:
        return {}
    kl = np.array([numerics.best_of_kl_bound(n) for n in sizes])
    gain = np.array([gold[n] - gold[1] for n in sizes])
    alpha, beta = numerics.overoptimisation(kl, gain)
    some = slice(len(fitted))
    first, fall = numerics.overoptimisation(kl[some], gain[some])
    d = float(np.sqrt(kl[-1]))
    return {
        "best_of/alpha": alpha,
        "best_of/beta": beta,
        "best_of/form_error": abs(d * (first - fall * d) - float(gain[-1])),
        "best_of/line_error": abs(d * numerics.without_fall(kl[some], gain[some]) - float(gain[-1])),
    }


def prompts_of(data: DataSource, split: str) -> Sequence[Prompt]:
    """The prompts of a split; empty if the data have none."""
    try:
        return data.prompts(split)
    except MissingData:
        return ()


def win_rates(better: np.ndarray, longer: np.ndarray, clusters: np.ndarray) -> dict[str, Measure]:
    """The win rate, and that at equal length if it is known.

    Args:
      better: [N], the response's score less the baseline's. Pairs without a score, which are not finite, are left out.
      longer: [N], the response's length less the baseline's, in tokens.
      clusters: int [N], the prompt of each. The interval at equal length takes all pairs for independent.
    """
    known = np.isfinite(better)
    wins = (better[known] > 0) + 0.5 * (better[known] == 0)
    found = {"win_rate": proportion(wins, clusters[known])}
    if len(wins) and (controlled := numerics.length_controlled_win_rate(wins, longer[known])):
        rate, low, high = controlled
        found["length_controlled_win_rate"] = {"mean": rate, "low": low, "high": high, "n": len(wins)}
    return found


def gain(answers: Answers, before: Answers | None) -> dict[str, Measure]:
    """The gain over the policy of the previous round, prompt by prompt: in gold score if known, else in the reward model's."""
    if before is None or answers.preference is None or before.preference is None:
        return {}
    difference = answers.preference - before.preference
    return {"gain": mean(difference, answers.clusters)}


def rows(answers: Answers, count: int) -> list[Mapping[str, Any]]:
    """Answers as readable text, with their scores: to prompts spread evenly over all, the same ones for every policy."""
    responses = answers.samples.responses
    total = len(responses.texts)
    shown = min(count, total)
    return [
        {
            "prompt": "\n".join(m.content for m in responses.prompts[i].messages),
            "response": responses.texts[i],
            "gold": float(answers.gold["gold"][i]) if answers.gold else None,
            "score": None if answers.scores is None else float(answers.scores[i]),
            **{name: float(verdicts[i]) for name, verdicts in answers.judged.items()},
        }
        for i in (place * total // shown for place in range(shown))
    ]
