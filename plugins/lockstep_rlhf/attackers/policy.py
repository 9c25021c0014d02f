"""`attacker=policy`: a language model writes the attacks, zero-shot, few-shot, or after training on successful attacks or
against the target (Perez et al. 2022, arXiv 2202.03286, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.config.root import component_config
from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import Attacker, DataSource, Inputs, Resources
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.similarity import users_turns
from lockstep.text.stopping import Stops
from lockstep.types import Goal, Message, Prompt
from lockstep_rlhf.environments.target import Target, attack_in


class PolicyAttacker(Attacker):
    """Prompts a policy with the shots as a dialogue, then `Goal.ask`. The response is the attack, a single user turn; with a
    ``target``, an episode with it is: the user's turns, and the target's replies to all but the last."""

    @dataclass(frozen=True)
    class Config:
        source: str = setting("attacker", "The policy that attacks: a stage, or a folder or hub id.")
        shots: tuple[tuple[str, ...], ...] = setting((), "Pairs of a goal and an attack on it, shown before the goal.")
        names_goal: bool = setting(True, "Whether an attack must contain the goal's words.")
        temperature: float = setting(1.0, "Sampling temperature.", above=0)
        batch_size: int = setting(100, "Attacks per forward pass.", least=1)
        lengths: Lengths = setting(Lengths(), "Limits in tokens.")
        stop_strings: tuple[str, ...] = setting((), "Text that ends an attack, as EOS does; or special tokens by name.")
        target: Mapping[str, Any] | None = setting(None, "The group of environment=target, for attacks of several turns.")

        def __post_init__(self) -> None:
            if any(len(shot) != 2 for shot in self.shots):
                raise ConfigError("attacker.shots has an entry that is no pair. Write [[goal, attack], ...].")
            self.parsed_target()

        def parsed_target(self) -> Target.Config | None:
            """
            Raises:
              ConfigError: a key of ``target`` is wrong or missing.
            """
            return None if self.target is None else component_config(Target, dict(self.target), "attacker.target")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        target = config.parsed_target()
        return Inputs(outputs={config.source: "policy", **({} if target is None else Target.inputs(target).outputs)})

    def __init__(self, config: Config, data: DataSource, resources: Resources):
        self.config = config
        self.policy, self.tokenizer = resources.policy(config.source)
        config.lengths.check(self.policy.context_length)
        target = config.parsed_target()
        self.target = None if target is None else Target(target, resources)

    def attack(self, goals: Sequence[Goal], seed: int) -> Sequence[Sequence[Message] | None]:
        c = self.config
        ids = [encoding.encode_prompt(self.tokenizer, self._asked(goal), c.lengths.prompt) for goal in goals]
        fitting = [place for place, found in enumerate(ids) if found is not None]
        attacks: list[Sequence[Message] | None] = [None] * len(goals)
        if not fitting:
            return attacks
        sampler = Sampler(Stops(self.tokenizer, c.stop_strings), c.lengths, c.temperature, c.batch_size, self.target)
        seeds = token_seeds(seed, "attack", 0, len(goals), c.lengths.response)[fitting]
        prompts, given = [self._asked(goals[place]) for place in fitting], [found for found in ids if found is not None]
        samples = sampler.sample(self.policy, prompts, given, seeds)
        written = zip(samples.responses.prompts, samples.responses.texts, strict=True)
        for place, asked, (prompt, text), finished in zip(fitting, prompts, written, samples.finished, strict=True):
            attack = attack_in(asked, [*prompt.messages[len(asked.messages) :], Message("assistant", text)])
            said = users_turns(attack.messages)
            if finished and all(said) and (not c.names_goal or any(goals[place].text in turn for turn in said)):
                attacks[place] = list(attack.messages)
        return attacks

    def _asked(self, goal: Goal) -> Prompt:
        shown = [each for ask, attack in self.config.shots for each in (Message("user", ask), Message("assistant", attack))]
        return Prompt((*shown, *goal.prompt().messages), {"goal": goal.text})
