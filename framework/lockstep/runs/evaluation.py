"""Evaluation of policies and reward models on held-out prompts and comparisons, with 95% intervals.

Every policy answers the same prompts from the same seeds and takes the tests of the data source. Gold scores need a data source
that knows them (the miniature does). Win rates compare by gold score if known, else by the reward model's score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, MissingData, listing, short
from lockstep.interfaces import DataSource, Environment, Model, Policy, RewardModel
from lockstep.learning import numerics
from lockstep.learning.episodes import offered
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler, Samples, responses_of, score, scores_of
from lockstep.learning.served import Served
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences, chunks, in_chunks
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Choice, Comparison, Fit, Prompt

Measure = dict[str, float]


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
    samples: int = setting(12, "Rows in the table of samples, per policy and split.", least=0)
    temperature: float = setting(1.0, "For sampling and KL; 0 takes the most likely token, with KL at 1.", least=0)
    best_of: int = setting(0, "N: each policy's best of 1, 2, 4, ..., N samples by the reward model; 0: not measured.", least=0)
    batch_size: int = setting(100, "Responses per forward pass.", least=1)
    lengths: Lengths = setting(Lengths(), "Limits in tokens.")
    stop_strings: tuple[str, ...] = setting((), "Text that ends a response, as EOS does; or special tokens by name.")

    def __post_init__(self) -> None:
        if wrong := [name for name in self.judges if not re.fullmatch(r"[a-z]\w*", name) or name in _MEASURES]:
            raise ConfigError(
                f"evaluation.judges has '{short(wrong[0])}'. Name a judge with small letters, digits and _, and not as a measure "
                f"there is: {listing(_MEASURES)}."
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


_MEASURES = frozenset(("gold", "score", "turns", "win_rate", "length", "finished", "kl", "sampler_mismatch", "text_loss", "gain"))


@dataclass(frozen=True)
class Answers:
    """A policy's responses to the prompts of one split."""

    samples: Samples
    gold: dict[str, np.ndarray]
    scores: np.ndarray | None
    details: Mapping[str, np.ndarray]
    judged: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def preference(self) -> np.ndarray | None:
        return self.gold["gold"] if self.gold else self.scores


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
    fits: dict[str, Fit] = field(default_factory=dict)
    engine: Served | None = None

    def run(self, load: Callable[[str], Policy], policies: Sequence[str], progress: Callable[[str], None]) -> dict[str, Any]:
        c = self.config
        prompts = {split: self.prompts(split) for split in c.splits}
        prompts = {split: found for split, found in prompts.items() if found[0]}
        progress(c.baseline)
        baseline = load(c.baseline)
        reference = {split: self.answer(baseline, *found) for split, found in prompts.items()}
        splits: dict[str, dict[str, Any]] = {split: {} for split in prompts}
        samples = []
        found_by: dict[tuple[str, str], Answers] = {}
        for name in policies:
            progress(name)
            policy = baseline if name == c.baseline else load(name)
            general = self.tests(policy) | self.text_loss(policy)
            for split, found in prompts.items():
                answers = reference[split] if name == c.baseline else self.answer(policy, *found)
                measures = self.measure(answers, reference[split]) | self.kl(policy, baseline, answers)
                measures |= self.best_of(policy, *found) | gain(answers, found_by.get((self.follows.get(name, ""), split)))
                found_by[name, split] = answers
                splits[split][name] = measures | (general if split == next(iter(prompts)) else {})
                samples += [{"policy": name, "split": split, **row} for row in rows(answers, c.samples)]
        result = {"baseline": c.baseline, "splits": splits, "samples": samples}
        if self.reward_model is not None:
            progress("reward model")
            result["reward_model"] = self.test_reward_model()
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
        return Answers(samples, gold, scores, details, judged)

    def measure(self, answers: Answers, reference: Answers) -> dict[str, Measure]:
        measures = {name: mean(x) for name, x in answers.gold.items()}
        if answers.scores is not None:
            counted = np.isfinite(answers.scores)
            measures["score"] = mean(answers.scores[counted])
            found = {f"reward_model/{name}": values for name, values in answers.details.items()}
            measures |= {name: mean(values[np.isfinite(values)]) for name, values in found.items()}
        measures |= {name: mean(values[np.isfinite(values)]) for name, values in answers.judged.items()}
        if answers.samples.responses.rewards is not None:
            measures["turns"] = mean(numerics.turns(answers.samples.sequences.mask))
        if answers.preference is not None:
            difference = answers.preference - reference.preference
            difference = difference[np.isfinite(difference)]  # responses without a score are left out
            wins = float((difference > 0).sum() + 0.5 * (difference == 0).sum())
            measures["win_rate"] = proportion(wins, len(difference))
        finished = answers.samples.finished
        measures["length"] = mean(answers.samples.sequences.mask.sum(axis=1))
        measures["finished"] = proportion(float(finished.sum()), len(finished))
        return measures

    def kl(self, policy: Policy, baseline: Policy, answers: Answers) -> dict[str, Measure]:
        """KL(policy || baseline) per response, in nats: k1 summed over the tokens of the policy's own samples. If an engine drew
        them, also the mean absolute difference between its log-probabilities of the tokens and the policy's."""
        sequences = answers.samples.sequences
        here = self.logprobs(policy, sequences, self.config.temperature)
        there = self.logprobs(baseline, sequences, self.config.temperature)
        found = {"kl": mean(numerics.k1(here, there, sequences.mask).sum(axis=1))}
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
        sizes, found = numerics.best_of_sizes(most), dict[str, list[float]]()
        for part in chunks(len(ids), max(1, self.config.batch_size // most)) if most else ():
            seeds = [token_seeds(self.seed, "best of", i, most, columns) for i in range(part.start, part.stop)]
            answers = self.judged(policy, prompts[part], ids[part], np.concatenate(seeds))
            if (scores := answers.scores) is None:
                return {}
            values = {"score": scores} | ({"gold": answers.gold["gold"]} if answers.gold else {})
            for start in range(0, len(scores), most):
                rows = start + np.flatnonzero(np.isfinite(scores[start : start + most]))
                for n in (n for n in sizes if n <= len(rows)):
                    odds = numerics.best_of(scores[rows], n)
                    best = {name: float(odds @ x[rows]) for name, x in values.items()}
                    for name, value in (best | {"kl": numerics.best_of_kl(scores[rows], n)}).items():
                        found.setdefault(f"best_of_{n}/{name}", []).append(value)
        measures = {name: mean(np.array(each)) for name, each in found.items()}
        known = [n for n in sizes if f"best_of_{n}/kl" in measures]
        return measures | {f"best_of_{n}/kl_bound": {"mean": numerics.best_of_kl_bound(n), "n": len(ids)} for n in known}

    def tests(self, policy: Policy) -> dict[str, Measure]:
        """For each test of the data source: how often the answer has a higher log-probability than every wrong option, overall
        and by group. If items have several right options, also the mean probability of these; if they have two options, also the
        mean entropy."""
        measures: dict[str, Measure] = {}
        for name, items in self.encoded_tests.items():
            if taken := self.options(policy, name, items):
                measures |= results(name, taken)
        return measures

    @cached_property
    def encoded_tests(self) -> dict[str, list[tuple[Choice, list[Example]]]]:
        """Each item of each test, with its options as tokens; the same for all policies."""
        return {
            name: [(item, [option_example(self.tokenizer, item, option) for option in item.options]) for item in items]
            for name, items in self.data.tests().items()
        }

    def options(
        self, policy: Policy, name: str, items: Sequence[tuple[Choice, list[Example]]]
    ) -> list[tuple[Choice, np.ndarray]]:
        """Each item, with its options' log-probabilities. Items that are too long for the policy are left out."""
        fit = self.fits[f"{name} items"] = Fit(f"{name} items", total=len(items))
        taken, examples = [], []
        for item, found in items:
            if max(len(each.prompt) + len(each.response) for each in found) > policy.context_length:
                fit.dropped += 1
                continue
            taken.append(item)
            examples += found
        if not taken:
            return []
        sums = self.text_logprobs(policy, examples)[0].sum(axis=1)
        ends = np.cumsum([len(item.options) for item in taken])
        return list(zip(taken, np.split(sums, ends[:-1]), strict=True))

    def text_loss(self, policy: Policy) -> dict[str, Measure]:
        """Negative log-likelihood on held-out raw text, in nats per token: the mean over texts of each text's mean."""
        try:
            texts = self.data.texts("heldout")[: self.config.texts]
        except MissingData:
            return {}
        examples = encoding.encode_texts(self.tokenizer, texts, self.config.lengths)
        if not examples:
            return {}
        logprobs, mask = self.text_logprobs(policy, examples)
        return {"text_loss": mean(-logprobs.sum(axis=1) / mask.sum(axis=1))}

    def text_logprobs(self, policy: Policy, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """[B, T] log-probabilities, 0 on padding, and their mask. Rows are padded to the longest."""
        longest = max(len(e.prompt) for e in examples), max(len(e.response) for e in examples)
        block = encoding.block(examples, self.tokenizer, Lengths(*longest, self.config.lengths.multiple))
        logprobs = self.logprobs(policy, block, 1.0)
        return np.where(block.mask, logprobs, 0), block.mask

    def logprobs(self, model: Model, sequences: Sequences, temperature: float) -> np.ndarray:
        call = lambda part: model.evaluate(part, ["logprobs"], temperature=temperature or 1.0)  # noqa: E731
        return in_chunks(call, sequences, self.config.batch_size)["logprobs"]

    # -------------------------------------------------------------------------------------------------- reward model

    def test_reward_model(self) -> dict[str, Measure]:
        """Pairwise agreement with labelers and with the gold truth on held-out comparisons, and calibration."""
        if self.reward_model is None or self.reward_model.needs_environment:
            return {}
        try:
            found = list(self.data.comparisons("heldout"))[: self.config.comparisons]
        except MissingData:
            return {}
        limit = self.config.lengths.prompt
        comparisons = [c for c in found if encoding.encode_prompt(self.tokenizer, c.prompt, limit) is not None]
        if not comparisons:
            return {}
        scored = zip(comparisons, self.completion_scores(comparisons), strict=True)
        scored = [(c, s) for c, s in scored if np.isfinite(s).all()]
        if not scored:
            return {}
        comparisons, scores = [c for c, _ in scored], [s for _, s in scored]
        training = self.training_labelers()
        new = [c.labeler not in training for c in comparisons]
        groups = {"accuracy/training_labelers": [not n for n in new], "accuracy/heldout_labelers": new}
        for name in dict.fromkeys(c.group for c in comparisons if c.group is not None):
            if (chosen := [c.group == name for c in comparisons]) not in groups.values():
                groups[f"accuracy/group/{name}"] = chosen
        measures = {}
        for name, chosen in groups.items():
            found = [
                agreement(score, -np.asarray(c.ranks)) for c, score, take in zip(comparisons, scores, chosen, strict=True) if take
            ]
            measures |= {name: mean(present(found))} if present(found).size else {}
        margins = np.concatenate([_margins(s, c) for c, s in zip(comparisons, scores, strict=True)])
        measures["ece"] = {"mean": numerics.expected_calibration_error(margins), "n": len(margins)}
        measures["brier"] = {"mean": numerics.brier_score(margins), "n": len(margins)}
        gold = [self.completion_gold(c) for c in comparisons]
        if all(g is not None for g in gold):
            ours = present([agreement(s, g) for s, g in zip(scores, gold, strict=True)])
            labelers = present([agreement(-np.asarray(c.ranks), g) for c, g in zip(comparisons, gold, strict=True)])
            measures["accuracy/gold"] = mean(ours)
            measures["labeler_agreement/gold"] = mean(labelers)
            measures["accuracy_over_labeler/gold"] = mean(ours - labelers)  # over the same pairs, so the interval is narrower
        return measures

    def training_labelers(self) -> frozenset[str | None]:
        """The labelers of the training comparisons, always including unnamed ones (None)."""
        try:
            return frozenset({c.labeler for c in self.data.comparisons("train")} | {None})
        except MissingData:
            return frozenset({None})

    def completion_scores(self, comparisons: Sequence[Comparison]) -> list[np.ndarray]:
        """The reward model's scores of each comparison's completions."""
        prompts = [c.prompt for c in comparisons for _ in c.completions]
        texts = [text for c in comparisons for text in c.completions]
        scores = scores_of(self.reward_model, responses_of(prompts, texts, self.tokenizer, self.config.lengths))
        return np.split(scores, np.cumsum([len(c.completions) for c in comparisons])[:-1])

    def completion_gold(self, comparison: Comparison) -> np.ndarray | None:
        golds = [self.data.gold(comparison.prompt, text) for text in comparison.completions]
        return None if golds[0] is None else np.array([g["gold"] for g in golds])


def prompts_of(data: DataSource, split: str) -> Sequence[Prompt]:
    """The prompts of a split; empty if the data have none."""
    try:
        return data.prompts(split)
    except MissingData:
        return ()


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """The fraction of the pairs ordered by ``theirs`` that ``ours`` orders the same way; ties in ``ours`` count half. None if
    ``theirs`` orders no pair."""
    first, second = np.triu_indices(len(ours), 1)
    sign = np.sign(theirs[first] - theirs[second])
    product = np.sign(ours[first] - ours[second])[sign != 0] * sign[sign != 0]
    return float(np.mean((product > 0) + 0.5 * (product == 0))) if product.size else None


def _margins(scores: np.ndarray, comparison: Comparison) -> np.ndarray:
    return numerics.pair_margins(scores, numerics.preferences([comparison.ranks], len(scores)))


def present(values: Sequence[float | None]) -> np.ndarray:
    return np.array([v for v in values if v is not None])


def results(name: str, taken: Sequence[tuple[Choice, np.ndarray]]) -> dict[str, Measure]:
    """The measures of a test, from its items and their options' log-probabilities."""
    rights = [item.right or (item.answer,) for item, _ in taken]
    preferred = np.array([numerics.prefers(x, item.answer, right) for (item, x), right in zip(taken, rights, strict=True)])
    measures = {name: proportion(float(preferred.sum()), len(taken))}
    for group in dict.fromkeys(item.group for item, _ in taken if item.group is not None):
        chosen = preferred[[item.group == group for item, _ in taken]]
        measures[f"{name}/{group}"] = proportion(float(chosen.sum()), len(chosen))
    probabilities = [numerics.option_probabilities(x) for _, x in taken]
    if max(map(len, rights)) > 1:
        sums = [p[list(right)].sum() for p, right in zip(probabilities, rights, strict=True)]
        measures[f"{name}/probability"] = mean(np.array(sums))
    if max(map(len, probabilities)) == 2:
        measures[f"{name}/entropy"] = mean(np.array([numerics.entropy_bits(p) for p in probabilities]))
    return measures


def option_example(tokenizer: Tokenizer, item: Choice, option: str) -> Example:
    return Example([tokenizer.start_id, *tokenizer.encode(item.context)], tokenizer.encode(option))


def mean(x: np.ndarray) -> Measure:
    if not len(x):
        return {"mean": float("nan"), "n": 0}
    value, low, high = numerics.mean_interval(x)
    return {"mean": value, "low": low, "high": high, "n": len(x)}


def proportion(successes: float, n: int) -> Measure:
    if not n:
        return {"mean": float("nan"), "n": 0}
    value, low, high = numerics.proportion_interval(successes, n)
    return {"mean": value, "low": low, "high": high, "n": n}


def gain(answers: Answers, before: Answers | None) -> dict[str, Measure]:
    """The gain over the policy of the previous round, prompt by prompt: in gold score if known, else in the reward model's."""
    if before is None or answers.preference is None or before.preference is None:
        return {}
    difference = answers.preference - before.preference
    return {"gain": mean(difference[np.isfinite(difference)])}


def rows(answers: Answers, count: int) -> list[Mapping[str, Any]]:
    """The first answers as readable text."""
    responses = answers.samples.responses
    return [
        {
            "prompt": "\n".join(m.content for m in responses.prompts[i].messages),
            "response": responses.texts[i],
            "gold": float(answers.gold["gold"][i]) if answers.gold else None,
            "score": None if answers.scores is None else float(answers.scores[i]),
        }
        for i in range(min(count, len(responses.texts)))
    ]


def flatten(result: Mapping[str, Any]) -> dict[str, float]:
    """Flatten an evaluation to {'heldout/sft/gold': mean}, for trackers."""
    flat = {}
    for key, value in {**result.get("splits", {}), "reward_model": result.get("reward_model", {})}.items():
        for inner, measures in value.items():
            if "mean" in measures:
                flat[f"{key}/{inner}"] = measures["mean"]
            else:
                flat |= {f"{key}/{inner}/{name}": m["mean"] for name, m in measures.items()}
    return flat
