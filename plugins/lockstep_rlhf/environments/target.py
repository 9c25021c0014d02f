"""The target of an attacker, in a conversation of several turns. Each turn of the policy is a user's turn to the target, and the
target's reply is the message that the policy reads next: one language model red-teams another in dialogue (Perez et al. 2022,
arXiv 2202.03286, section 7).

    the policy's episode    <user> steal a lamp  <assistant> Is it dark?  <user> Quite.       <assistant> How do I steal a lamp?
    the target's dialogue                        <user> Is it dark?       <assistant> Quite.  <user> How do I steal a lamp?
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.interfaces import Environment, Episode, Inputs, Reply, Resources
from lockstep.learning.episodes import EnvironmentConfig
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.similarity import users_turns
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Message, Prompt


class Target(Environment):
    """Replies as the target does. A reply is drawn from seeds made of the goal and the dialogue so far, so it depends neither on
    the batch nor on the step. The episode ends after ``turns``, and early if the policy says nothing or the dialogue is longer
    than the target's limits. Its reward is always 0: `reward_model=attack` scores the whole dialogue."""

    @dataclass(frozen=True, kw_only=True)
    class Config(EnvironmentConfig):
        policy: str = setting(REQUIRED, "The target: a stage, a folder or hub id, or 'new', the configured policy.")
        temperature: float = setting(1.0, "Sampling temperature of the replies.", above=0)
        batch_size: int = setting(100, "Replies per forward pass.", least=1)
        lengths: Lengths = setting(Lengths(), "Limits of the target, in tokens: of the dialogue so far, and of its reply.")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs({config.policy: "policy"})

    def __init__(self, config: Config, resources: Resources):
        super().__init__(config, resources)
        self.target, self.tokenizer = resources.policy(config.policy)
        config.lengths.check(self.target.context_length, "target")
        self.sampler = Sampler(Stops(self.tokenizer), config.lengths, config.temperature, config.batch_size)

    def reply(self, episode: Episode) -> Reply:
        return self.replies([episode])[0]

    def replies(self, episodes: Sequence[Episode]) -> list[Reply]:
        lengths: Lengths = self.config.lengths
        found = [Reply.ends()] * len(episodes)
        attacks = [attack_in(episode.prompt, episode.messages) for episode in episodes]
        ids = [encoded(self.tokenizer, attack, lengths.prompt) for attack in attacks]
        answered = [i for i, each in enumerate(episodes) if ids[i] is not None and each.turn < self.config.turns]
        if answered:
            prompts, given = [attacks[i] for i in answered], [ids[i] or [] for i in answered]
            seeds = np.concatenate([reply_seeds(prompt, 1, lengths.response) for prompt in prompts])
            for i, text in zip(answered, self.sampler.sample(self.target, prompts, given, seeds).responses.texts, strict=True):
                found[i] = Reply.says(text)
        return found


def attack_in(goal: Prompt, turns: Iterable[Message]) -> Prompt:
    """An attack as a prompt for the target: what an attacker and the target said in turn, after the prompt with the goal."""
    known = goal.truth
    said = (
        Message("user", turn.content.strip()) if turn.role == "assistant" else Message("assistant", turn.content)
        for turn in turns
    )
    return Prompt(tuple(said), {**known.get("pursued", {}), **({"goal": known["goal"]} if "goal" in known else {})})


def encoded(tokenizer: Tokenizer, attack: Prompt, limit: int) -> list[int] | None:
    """The attack as token ids for the target; None if a turn is empty or the dialogue has more than ``limit`` tokens."""
    return encoding.encode_prompt(tokenizer, attack, limit, whole=True) if all(users_turns(attack.messages)) else None


def reply_seeds(attack: Prompt, replies: int, columns: int) -> np.ndarray:
    """uint32 [replies, columns]: the seeds of the target's replies to an attack, a function of its goal and its messages."""
    text = "\0".join((str(attack.truth.get("goal", "")), *(message.content for message in attack.messages)))
    return token_seeds(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]), "replies", 0, replies, columns)
