"""The shop: questions that no weights can answer, and an environment that can.

    <user> how many lamp are in the shop ?   <assistant> count lamp        <user> 7   <assistant> there are 7 .
    <user> what is 3 plus 4 plus 9 ?         <assistant> 3 plus 4          <user> 7   <assistant> 7 plus 9   <user> 16   ...

The stock is drawn anew for every question, so without counting a policy can only guess (one in twenty is right). The shop is its
own data source, whose demonstrations are single turns, and the environment that answers `COUNT` and sums of two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.config.schema import setting
from lockstep.data.drawn import Drawn, check_split
from lockstep.errors import MissingData
from lockstep.interfaces import DataSource, Environment, Episode, Reply
from lockstep.learning.episodes import EnvironmentConfig
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Message, Prompt
from lockstep_miniature.dice import Dice
from lockstep_miniature.source import own_tokenizer
from lockstep_miniature.world import NUMBERS, THINGS

STOCK, SUM = "how many {} are in the shop ?", "what is {} plus {} plus {} ?"
ANSWER = "there are {} ."
COUNT = "count"


@dataclass(frozen=True)
class Question:
    """A question to the policy. ``steps``: what to say to the shop, each with the shop's reply; the last reply is the answer.
    ``stock``: the number of each thing there is to count."""

    text: str
    steps: tuple[tuple[str, str], ...]
    stock: dict[str, int]

    @property
    def answer(self) -> str:
        return self.steps[-1][1]

    def prompt(self, done: int = 0) -> Prompt:
        """The prompt as asked, or after the first ``done`` steps."""
        said = [message for step, reply in self.steps[:done] for message in (Message("assistant", step), Message("user", reply))]
        return Prompt((Message("user", self.text), *said), {"answer": self.answer, "stock": self.stock})


def draw(dice: Dice) -> Question:
    if dice.chance(0.5):
        thing, count = dice.pick(THINGS), dice.pick(NUMBERS)
        return Question(STOCK.format(thing), ((f"{COUNT} {thing}", count),), {thing: int(count)})
    a, b, c = (1 + dice.below(6) for _ in range(3))
    return Question(SUM.format(a, b, c), ((f"{a} plus {b}", str(a + b)), (f"{a + b} plus {c}", str(a + b + c))), {})


def answer_to(said: str, stock: dict[str, int]) -> str | None:
    """The shop's reply to ``said``; None if the shop does not understand it."""
    match said.split():
        case ["count", thing] if thing in stock:
            return str(stock[thing])
        case [a, "plus", b] if a in NUMBERS and b in NUMBERS and str(int(a) + int(b)) in NUMBERS:
            return str(int(a) + int(b))
    return None


def is_right(said: str, answer: str) -> bool:
    """True if ``said`` names the answer and no other number."""
    return {word for word in said.split() if word in NUMBERS} == {answer}


class Shop(Environment):
    """Replies to turns that it understands. Any other turn is the policy's answer, worth 1 if it is right."""

    @dataclass(frozen=True)
    class Config(EnvironmentConfig):
        turn_tokens: int | None = setting(8, "Most tokens in a turn; the longest has seven.", least=1)
        reply_tokens: int = setting(4, "Most tokens in a reply; the shop says one.", least=1)

    @classmethod
    def examples(cls, config: Config) -> Sequence[Prompt]:
        return [draw(Dice(0, "shop/examples", index)).prompt() for index in range(4)]

    def reply(self, episode: Episode) -> Reply:
        truth = episode.prompt.truth
        found = answer_to(episode.text, truth["stock"])
        return Reply.ends(float(is_right(episode.text, truth["answer"]))) if found is None else Reply.says(found)


class Questions(DataSource):
    @dataclass(frozen=True)
    class Config:
        """Sizes; item i is the same for every size."""

        seed: int = setting(0, "Seed of the questions; the run has its own.", least=0)
        demonstrations: int = setting(4000, "Training demonstrations, each a single turn.", least=1)
        prompts: int = setting(4000, "Training prompts.", least=1)
        heldout_demonstrations: int = setting(200, "Held-out demonstrations.", least=1)
        heldout_prompts: int = setting(500, "Held-out prompts.", least=1)

    def __init__(self, config: Config):
        self.config = config

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        """Single turns: one of a question's steps, or its answer."""

        def of(index: int) -> Demonstration:
            dice = Dice(self.config.seed, f"shop/demonstrations/{split}", index)
            question = draw(dice)
            done = dice.below(len(question.steps) + 1)
            said = [*(step for step, _ in question.steps), ANSWER.format(question.answer)]
            return Demonstration(question.prompt(done), said[done])

        return Drawn(self._size("demonstrations", split), of)

    def prompts(self, split: str) -> Sequence[Prompt]:
        size = self._size("prompts", split)
        return Drawn(size, lambda i: draw(Dice(self.config.seed, f"shop/prompts/{split}", i)).prompt())

    def comparisons(self, split: str) -> Sequence[Comparison]:
        raise MissingData("The shop has no comparisons. Set reward_model=environment, which needs none.")

    def texts(self, split: str) -> Sequence[str]:
        raise MissingData("The shop has no raw texts. Start with sft.")

    def tokenizer(self) -> Tokenizer:
        return own_tokenizer()

    def gold(self, prompt: Prompt, response: str) -> dict[str, float] | None:
        return {"gold": float(is_right(response, prompt.truth["answer"]))} if "stock" in prompt.truth else None

    def _size(self, noun: str, split: str) -> int:
        check_split("The shop", split)
        return getattr(self.config, noun if split == "train" else f"heldout_{noun}")
