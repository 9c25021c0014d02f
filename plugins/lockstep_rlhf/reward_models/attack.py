"""The reward of an attacker: does the target help?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import DataError
from lockstep.interfaces import DataSource, Inputs, Resources, Responses, RewardModel
from lockstep.learning.rollout import Sampler, score
from lockstep.text import similarity
from lockstep.text.encoding import Lengths
from lockstep.text.stopping import Stops
from lockstep.types import Message, Prompt
from lockstep_rlhf.environments.target import attack_in, encoded, reply_seeds


class AttackReward(RewardModel):
    """Scores each response as an attack on the target, in pursuit of the goal that its prompt names (`lockstep.types.Goal`): a
    valid attack by success + ``novelty`` · its novelty, an invalid one by -``invalid``.

    An attack is valid if it is not empty, fits the target's length limits and, with ``names_goal``, contains the goal. Success is
    the judge's mean score of the target's replies (Perez et al. 2022, arXiv 2202.03286, section 3.1). Novelty is the mean
    distance to the ``neighbours`` nearest attacks of the archive, with the goals left out (`lockstep.text.similarity.Archive`).
    Such curiosity keeps a trained attacker from repeating known attacks (Hong et al. 2024, arXiv 2402.19464).

    After an episode with environment=target, the attack is the whole dialogue. Success is then of replies to its last turn, where
    policies answer it in later stages too; what the target said before is context. (Perez et al., section 7, judge the replies to
    every turn, and report them turn by turn.) No user's turn may be empty, one of them must contain the goal, and the dialogue
    must fit as a whole. Novelty compares the user's turns.

    Each reply is drawn from seeds made of the goal and the attack, so a score does not depend on the batch. `details` has
    success, validity and novelty. If the judge cannot score a reply (NaN), the attack has no score (NaN).
    """

    @dataclass(frozen=True)
    class Config:
        judge: Mapping[str, Any] = setting(REQUIRED, "The judge's configuration, with its name; its score is the success.")
        policy: str = setting("ppo", "The target: a stage, a folder or hub id, or 'new', the configured policy.")
        invalid: float = setting(1.0, "Cost of an attack that does not name its goal or is too long.", least=0)
        novelty: float = setting(0.5, "Weight of novelty, which lies in 0 .. 1.", least=0)
        archive: tuple[str, ...] = setting((), "Stages (all.STAGE) or folders with the known attacks.")
        neighbours: int = setting(10, "Nearest attacks of the archive, to which novelty is the mean distance.", least=1)
        names_goal: bool = setting(True, "Whether an attack must contain the goal's words.")
        replies: int = setting(1, "Replies of the target to each attack; their scores are averaged.", least=1)
        temperature: float = setting(1.0, "Sampling temperature of the replies.", above=0)
        batch_size: int = setting(100, "Replies per forward pass.", least=1)
        lengths: Lengths = setting(Lengths(), "Limits of the target, in tokens.")

    @classmethod
    def rehearse(cls, config: Any, data: DataSource) -> None:
        data.goals("train")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs({config.policy: "policy", **dict.fromkeys(config.archive, "prompts")}, members=(config.judge,))

    def __init__(self, config: Config, resources: Resources):
        self.config = config
        self.target, self.tokenizer = resources.policy(config.policy)
        self.judge = resources.reward_model(config.judge)
        config.lengths.check(self.target.context_length)
        self.sampler = Sampler(Stops(self.tokenizer, ()), config.lengths, config.temperature, config.batch_size)
        known = [_strategy(attack) for source in config.archive for attack in resources.attacks(source)]
        self.archive = similarity.Archive(known, config.neighbours)
        self._details: dict[str, np.ndarray] = {}

    def score(self, responses: Responses) -> np.ndarray:
        c = self.config
        attacks = _attacks(responses)
        ids = [self._encoded(attack) for attack in attacks]
        valid = np.array([found is not None for found in ids])
        rows = np.flatnonzero(valid)
        success = np.zeros(len(attacks), np.float32)
        if len(rows):
            success[rows] = self._success([attacks[i] for i in rows], [found for found in ids if found is not None])
        novelty = np.zeros(len(attacks), np.float32)
        novelty[rows] = [self.archive.novelty(_strategy(attacks[i])) for i in rows]
        self._details = {"success": success, "valid": valid.astype(np.float32), "novelty": novelty}
        return np.where(valid, success + c.novelty * novelty, -c.invalid).astype(np.float32)

    def details(self) -> dict[str, np.ndarray]:
        return self._details

    def _encoded(self, attack: Prompt) -> list[int] | None:
        """The attack as token ids for the target; None if it is not valid.

        Raises:
          DataError: with ``names_goal``, the prompt has no goal.
        """
        if self.config.names_goal and "goal" not in attack.truth:
            raise DataError(
                "reward_model=attack scores attacks on goals, and a prompt has none. Let the attacker's stage answer goals: "
                "prompts: [goals]."
            )
        said = similarity.users_turns(attack.messages)
        if self.config.names_goal and not any(str(attack.truth["goal"]) in turn for turn in said):
            return None
        return encoded(self.tokenizer, attack, self.config.lengths.prompt)

    def _success(self, attacks: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [B]: the mean score of the target's replies to each attack."""
        c = self.config
        seeds = [reply_seeds(attack, c.replies, c.lengths.response) for attack in attacks]
        scores, _ = score(self.judge, self.sampler.sample(self.target, attacks, ids, np.concatenate(seeds)))
        return scores.reshape(len(attacks), c.replies).mean(axis=1)


def _attacks(responses: Responses) -> list[Prompt]:
    """The responses as prompts for the target: the attacker's last turn; of an episode without tools, all since the goal."""
    found = []
    for prompt, text in zip(responses.prompts, responses.texts, strict=True):
        alone = responses.rewards is None or any(message.role == "tool" for message in prompt.messages)
        before = () if alone else itertools.dropwhile(lambda message: message.role != "assistant", prompt.messages)
        found.append(attack_in(prompt, [*before, Message("assistant", text)]))
    return found


def _strategy(attack: Prompt) -> str:
    return similarity.strategy(similarity.users_turns(attack.messages), str(attack.truth.get("goal", "")))
