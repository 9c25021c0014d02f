"""Data that is computed when it is read, and prompts for environments whose episodes start from a seed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import DataError, EnvironmentFailed, MissingData, did_you_mean, listing, short, told
from lockstep.interfaces import DataSource
from lockstep.types import Comparison, Demonstration, Prompt

T = TypeVar("T")

SPLITS = ("train", "heldout")
MOST = 10**8


class Drawn(Sequence[T]):
    """A sequence that computes each item when it is read, so large corpora cost nothing until then."""

    def __init__(self, length: int, draw: Callable[[int], T]):
        self._length = length
        self._draw = draw

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._draw(i) for i in range(*index.indices(self._length))]
        return self._draw(range(self._length)[index])


def check_split(owner: str, split: str, known: Sequence[str] = SPLITS, of: str = "") -> None:
    """
    Args:
      owner: who has splits, for the message: 'The shop'.
      of: the kind of rows, if it matters: ' of prompts'.

    Raises:
      DataError: ``split`` is not among the known ones.
    """
    if split not in known:
        raise DataError(f"{owner} has no split '{short(split)}'{of}.{did_you_mean(split, known)} It has: {listing(known)}.")


@dataclass(frozen=True, kw_only=True)
class SeededConfig:
    """Instructions, seed and sizes. Prompt i is the same for every size."""

    instructions: str = setting(REQUIRED, "The start of each prompt, before the first observation: the rules, and how to act.")
    seed: int = setting(0, "Decides the first episode; the run has a seed of its own.", least=0, most=MOST)
    prompts: int = setting(1000, "Number of training prompts.", least=1, most=MOST)
    heldout_prompts: int = setting(200, "Number of held-out prompts.", least=1, most=MOST)


class Seeded(DataSource):
    """Prompts for an environment that starts an episode from a seed: instructions, and the first observation. Training seeds
    are even and held-out seeds odd, so no episode is in both splits."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def first(self, seed: int) -> str:
        """The first observation of the episode with this seed."""

    def prompts(self, split: str) -> Sequence[Prompt]:
        if split not in SPLITS:
            raise DataError(f"No split '{short(split)}'.{did_you_mean(split, SPLITS)} There are: {listing(SPLITS)}.")
        held = split == "heldout"

        def draw(index: int) -> Prompt:
            seed = 2 * (self.config.seed + index) + held
            return opening(self.config.instructions, self.first(seed), seed)

        return Drawn(self.config.heldout_prompts if held else self.config.prompts, draw)

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        raise MissingData("An environment has no demonstrations. Remove the sft stage, and start from a pretrained policy.")

    def comparisons(self, split: str) -> Sequence[Comparison]:
        raise MissingData("An environment has no comparisons. Set reward_model=environment, which needs none.")

    def texts(self, split: str) -> Sequence[str]:
        raise MissingData("An environment has no raw texts. Start from a pretrained policy.")


def opening(instructions: str, first: str, seed: int) -> Prompt:
    return Prompt.of(f"{instructions}\n\n{first}".strip(), seed=seed)


def seed_of(prompt: Prompt) -> int:
    """
    Raises:
      EnvironmentFailed: the prompt has no seed.
    """
    if type(seed := prompt.truth.get("seed")) is not int:
        raise EnvironmentFailed("the prompt has no seed. The data source of the environment's own name gives each prompt one.")
    return seed


def check_beginning(prompt: Prompt, first: str) -> None:
    """Check that the episode begins as its prompt says.

    Raises:
      EnvironmentFailed: it begins differently.
    """
    if first.strip() not in prompt.messages[-1].content:
        raise EnvironmentFailed(
            f"its episode with the seed {prompt.truth['seed']} begins with {told(first)}, and the prompt says something else. "
            "data and environment must name the same environment, and it must begin alike each time."
        )
