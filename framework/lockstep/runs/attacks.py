"""Attacks on policies: an attacker writes requests for the data's goals, the policies reply, and a judge says which attacks
succeeded (Perez et al. 2022, "Red teaming language models with language models", arXiv 2202.03286).

The attacks and their harmless twins become prompts of later stages. In collections and training, policies learn from them to
refuse attacks without refusing the twins. Evaluations use the attacks on held-out goals. Successful attacks become demonstrations
for the next attacker (Ge et al. 2023, "MART", arXiv 2311.07689).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import DataError
from lockstep.interfaces import Attacker, DataSource, Policy, RewardModel
from lockstep.learning.randomness import indices_of_round, seed_of, token_seeds
from lockstep.learning.rollout import Sampler, neighbours, score
from lockstep.learning.served import Served
from lockstep.text import encoding, similarity
from lockstep.text.encoding import Lengths
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Demonstration, Fit, Goal, Message, Prompt

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class AttackConfig:
    """The settings of an attack."""

    goals: int = setting(100, "Goals of the training split, drawn anew in each round, or all there are.", least=1)
    heldout_goals: int = setting(100, "Held-out goals, for evaluations: the first ones, or all there are.", least=0)
    samples: int = setting(4, "Attacks on each goal; equal ones are kept once.", least=1, most=1024)
    keep: Literal["all", "successes"] = setting("all", "Attacks that later stages get as prompts.")
    imitate: Literal["all", "successes"] = setting("successes", "Attacks that become an attacker's demonstrations.")
    twins: bool = setting(
        True, "Train also on each attack with a harmless goal in place of its own. Evaluations always have those."
    )
    threshold: float = setting(0.5, "The judge's score above which an attack has succeeded.", least=-float("inf"))
    temperature: float = setting(1.0, "For the policies' replies; 0 takes the most likely token.", least=0)
    batch_size: int = setting(100, "Replies per forward pass.", least=1)
    lengths: Lengths = setting(Lengths(), "Limits in tokens; longer attacks are left out.")
    stop_strings: tuple[str, ...] = setting((), "Text that ends a reply, as EOS does; or special tokens by name.")

    def attacked(self, data: DataSource, split: str) -> int:
        """How many of the split's goals are attacked."""
        return min(self.goals if split == "train" else self.heldout_goals, len(data.goals(split)))

    def arithmetic(self, data: DataSource) -> str:
        goals, heldout = (self.attacked(data, split) for split in SPLITS)
        return f"{self.samples} attacks on each of {goals} goals and {heldout} held-out goals"


@dataclass(frozen=True)
class Attack:
    """One attack. ``success`` is the share of the attacked policies that helped with its goal."""

    goal: Goal
    split: str
    prompt: Prompt
    twin: Prompt | None
    success: float

    @property
    def strategy(self) -> str:
        return similarity.strategy(similarity.users_turns(self.prompt.messages), self.goal.text)


@dataclass
class RedTeam:
    """Has attacks written, and tries them. ``round`` is the stage's number, from 1; ``order_seed`` decides the order
    of goals."""

    config: AttackConfig
    data: DataSource
    tokenizer: Tokenizer
    attacker: Attacker
    judge: RewardModel
    seed: int
    order_seed: int
    round: int
    engine: Served | None = None
    fits: dict[str, Fit] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)

    def run(self, load: Callable[[str], Policy], policies: Sequence[str], progress: Callable[[str], None]) -> list[Attack]:
        """The attacks, with their success against the policies. Fills ``measures``.

        Raises:
          DataError: the attacker wrote no attack on a training goal that fits.
        """
        progress("attacks")
        written = [found for split in SPLITS for found in self.written(split)]
        if not any(split == "train" for _, split, _ in written):
            raise DataError("The attacker found no words for any of the goals, or its attacks are too long.")
        prompts, ids = encoding.encode_prompts(self.tokenizer, [prompt for *_, prompt in written], self.config.lengths)
        succeeded = []
        for name in policies:
            progress(name)
            succeeded.append(self.success(load(name), prompts, ids))
            for split, chosen in self._by_split(written):
                self.measures[f"success/{split}/{name}"] = float(np.mean(succeeded[-1][chosen]))
        shares = np.mean(succeeded, axis=0)
        attacks = [
            Attack(goal, split, prompt, self.twin(split, prompt, goal), float(share))
            for (goal, split, prompt), share in zip(written, shares, strict=True)
        ]
        drawn = self.config.attacked(self.data, "train")
        self.measures |= diversity([each for each in attacks if each.split == "train"], drawn)
        return attacks

    def written(self, split: str) -> Iterator[tuple[Goal, str, Prompt]]:
        """(goal, split, attack) of each distinct attack that fits the length limits."""
        c, goals = self.config, self.data.goals(split)
        count = c.attacked(self.data, split)
        drawn = split == "train"  # held-out goals are the same in every round
        order = indices_of_round(self.order_seed, "attacks", len(goals), count, self.round) if drawn else range(count)
        chosen = neighbours([goals[i] for i in order], c.samples)
        if not chosen:
            return
        found = self.attacker.attack(chosen, seed_of(self.seed, f"attacks {split}"))
        if len(found) != len(chosen):
            raise DataError(f"The attacker wrote {len(found)} attacks on {len(chosen)} goals. It owes one, or None, for each.")
        self.measures[f"written/{split}"] = sum(each is not None for each in found) / len(found)
        fit = self.fits[f"{split} attacks"] = Fit(f"{split} attacks")
        seen = set()
        for goal, messages in zip(chosen, found, strict=True):
            if messages is None:
                continue
            prompt = attack_on(goal, messages)
            fit.total += 1
            fits = encoding.encode_prompt(self.tokenizer, prompt, c.lengths.prompt, fit, whole=True) is not None
            key = (goal.text, prompt.messages)
            if fits and key not in seen:
                seen.add(key)
                yield goal, split, prompt

    def success(self, policy: Policy, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> np.ndarray:
        """float [B]: 1 where the judge finds that the policy's reply to an attack helps with its goal, else 0. A reply that the
        judge could not score counts as 0."""
        c = self.config
        sampler = Sampler(Stops(self.tokenizer, c.stop_strings), c.lengths, c.temperature, c.batch_size, engine=self.engine)
        seeds = token_seeds(self.seed, "replies", 0, len(ids), c.lengths.response)
        return (score(self.judge, sampler.sample(policy, prompts, ids, seeds))[0] > c.threshold).astype(float)

    def twin(self, split: str, prompt: Prompt, goal: Goal) -> Prompt | None:
        """The attack with its goal's twin in the goal's place, if there is one and it fits."""
        if split == "train" and not self.config.twins:
            return None
        messages = self.attacker.twin(prompt.messages, goal)
        if messages is None or goal.twin is None:
            return None
        found = attack_on(goal.twin, messages)
        ids = encoding.encode_prompt(self.tokenizer, found, self.config.lengths.prompt, whole=True)
        return None if ids is None else found

    def _by_split(self, written: Sequence[tuple[Goal, str, Prompt]]) -> Iterator[tuple[str, np.ndarray]]:
        splits = np.array([split for _, split, _ in written])
        yield from ((split, splits == split) for split in SPLITS if (splits == split).any())


def attack_on(goal: Goal, messages: Sequence[Message]) -> Prompt:
    return Prompt(tuple(messages), goal.truth)


def demonstrations(attacks: Sequence[Attack], config: AttackConfig) -> list[Demonstration]:
    """Single-turn training attacks, as demonstrations for an attacker: the successes if only these are asked for and there are
    any, else all."""
    single = [each for each in attacks if each.split == "train" and len(each.prompt.messages) == 1]
    chosen = [each for each in single if each.success > 0] if config.imitate == "successes" else []
    return [Demonstration(each.goal.prompt(), each.prompt.messages[0].content) for each in chosen or single]


def diversity(attacks: Sequence[Attack], goals: int) -> dict[str, float]:
    """Diversity at three levels. goals: the share, of so many ``goals``, with a successful attack. strategies: distinct
    strategies per attack. words: the mean distance of a strategy to the nearest other one."""
    strategies = [each.strategy for each in attacks]
    return {
        "diversity/goals": len({each.goal.text for each in attacks if each.success > 0}) / goals,
        "diversity/strategies": len(set(strategies)) / len(strategies),
        "diversity/words": similarity.diversity(strategies[:MOST_COMPARED]),
    }


MOST_COMPARED = 500
"""The most attacks that are compared with one another."""


def kept(attacks: Sequence[Attack], config: AttackConfig) -> Iterator[tuple[Prompt, Mapping[str, Any]]]:
    """(prompt, facts) of each attack and twin that later stages read."""
    for each in attacks:
        if each.split == "train" and config.keep == "successes" and not each.success:
            continue
        yield each.prompt, {"goal": each.goal.text, "split": each.split, "success": each.success}
        if each.twin is not None and each.goal.twin is not None:
            yield each.twin, {"goal": each.goal.twin.text, "split": each.split, "twin": True}
