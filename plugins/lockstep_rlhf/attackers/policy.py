"""`attacker=policy`: a language model writes the attacks, zero-shot, few-shot, or after training on successful attacks or
against the target (Perez et al. 2022, arXiv 2202.03286, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import Attacker, DataSource, Inputs, Resources
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.stopping import Stops
from lockstep.types import Goal, Message, Prompt


class PolicyAttacker(Attacker):
    """Prompts a policy with the shots as a dialogue, then `Goal.ask`. The response is the attack, a single user turn."""

    @dataclass(frozen=True)
    class Config:
        source: str = setting("attacker", "The policy that attacks: a stage, or a folder or hub id.")
        shots: tuple[tuple[str, ...], ...] = setting((), "Pairs of a goal and an attack on it, shown before the goal.")
        names_goal: bool = setting(True, "Whether an attack must contain the goal's words.")
        temperature: float = setting(1.0, "Sampling temperature.", above=0)
        batch_size: int = setting(100, "Attacks per forward pass.", least=1)
        lengths: Lengths = setting(Lengths(), "Limits in tokens.")
        stop_strings: tuple[str, ...] = setting((), "Text that ends an attack, as EOS does; or special tokens by name.")

        def __post_init__(self) -> None:
            if any(len(shot) != 2 for shot in self.shots):
                raise ConfigError("attacker.shots has an entry that is no pair. Write [[goal, attack], ...].")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs(outputs={config.source: "policy"})

    def __init__(self, config: Config, data: DataSource, resources: Resources):
        self.config = config
        self.policy, self.tokenizer = resources.policy(config.source)
        config.lengths.check(self.policy.context_length)

    def attack(self, goals: Sequence[Goal], seed: int) -> Sequence[Sequence[Message] | None]:
        c = self.config
        ids = [encoding.encode_prompt(self.tokenizer, self._asked(goal), c.lengths.prompt) for goal in goals]
        fitting = [place for place, found in enumerate(ids) if found is not None]
        attacks: list[Sequence[Message] | None] = [None] * len(goals)
        if not fitting:
            return attacks
        sampler = Sampler(Stops(self.tokenizer, c.stop_strings), c.lengths, c.temperature, c.batch_size)
        seeds = token_seeds(seed, "attack", 0, len(goals), c.lengths.response)[fitting]
        prompts, given = [self._asked(goals[place]) for place in fitting], [found for found in ids if found is not None]
        samples = sampler.sample(self.policy, prompts, given, seeds)
        for place, text, finished in zip(fitting, samples.responses.texts, samples.finished, strict=True):
            written = text.strip()
            if finished and written and (not c.names_goal or goals[place].text in written):
                attacks[place] = [Message("user", written)]
        return attacks

    def _asked(self, goal: Goal) -> Prompt:
        shown = [each for ask, attack in self.config.shots for each in (Message("user", ask), Message("assistant", attack))]
        return Prompt((*shown, *goal.prompt().messages))
