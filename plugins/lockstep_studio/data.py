"""The data source ``human``: closed rounds of a studio as demonstrations, comparisons and prompts, for any experiment.

conf/data/human.yaml has a command to start from.

Prompts are held out by how their dialogue begins, as in the source ``files``: the first user message is hashed with the seed. So
no prompt is on both sides, whether it is in comparisons, demonstrations or conversations, and further rounds move no prompt.

Labelers may be held out too, by a share or by their group, like InstructGPT's held-out labelers (Ouyang et al. 2022, section
3.4). Then no labeler is on both sides either: rows by a held-out labeler on a training prompt, or the reverse, are left out and
counted. `Human.prompts` ignores labelers, since a prompt alone has none.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import DataError, MissingData, Unreachable, did_you_mean, listing, short
from lockstep.interfaces import DataSource
from lockstep.text.visible import visible
from lockstep.types import Comparison, Demonstration, Message, Prompt
from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import COMPARISONS, CONVERSATIONS, DEMONSTRATIONS, NOUNS, Row

SPLITS = ("train", "heldout")


class Human(DataSource):
    """A data source that reads each file once, on first use. ``Comparison.labeler`` is a pseudonym."""

    @dataclass(frozen=True)
    class Config:
        """The rounds to read, and what to hold out of them."""

        folder: str = setting(REQUIRED, "A closed round, or a folder of several: studio/rounds.")
        heldout_fraction: float = setting(0.05, "Share of the prompts to hold out.", least=0, below=1)
        heldout_labelers: float = setting(
            0.0, "Share of the labelers to hold out; with 0 and no groups, labelers are on both sides.", least=0, below=1
        )
        heldout_groups: tuple[str, ...] = setting((), "Groups whose labelers are all held out, whatever the share.")
        seed: int = setting(0, "Seed of the split; not the run's seed, so that runs with several seeds share the split.", least=0)

    def __init__(self, config: Config):
        self.config = config
        self._rows: dict[str, list[Row]] = {}
        self._split: dict[tuple[str, str], Sequence[Any]] = {}

    @classmethod
    def fingerprint(cls, config: Config) -> str | None:
        """A hash of the rounds' files: a stage is not reused if one of them has changed."""
        whole = hashlib.sha256()
        for folder in rounds.rounds_in(config.folder):
            for file in (folder / f"{noun}.jsonl" for noun in NOUNS):
                if file.is_file():
                    with open(file, "rb") as opened:
                        whole.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
        return whole.hexdigest()

    def survey(self) -> Iterator[tuple[str, str | Unreachable]]:
        found = ", ".join(f"{len(self._read(noun))} {noun}" for noun in NOUNS)
        yield "data.folder", f"{found} in {self.config.folder}, rounds: {len(rounds.rounds_in(self.config.folder))}"

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        """The rounds' demonstrations. If there are none, the message of `MissingData` says what to do."""
        return self._items(DEMONSTRATIONS, split, lambda row: Demonstration(_prompt(row), row["response"]))

    def comparisons(self, split: str) -> Sequence[Comparison]:
        """The rounds' comparisons, except uninformative ones, in which all completions tie or are the same."""
        return self._items(COMPARISONS, split, _comparison)

    def prompts(self, split: str) -> Sequence[Prompt]:
        """The prompts of comparisons and demonstrations, and the beginnings of conversations; each once."""
        _check_split(split)
        found = (_prompt(row) for noun in NOUNS for row in self._read(noun) if self._heldout(row) == (split == "heldout"))
        return self._some("prompts", split, tuple(dict.fromkeys(found)))

    def texts(self, split: str) -> Sequence[str]:
        raise MissingData(
            "Rounds have no raw texts. Start from a pretrained policy, and leave out what needs texts: '~stages.pretrain' "
            "'~stages.ppo_ptx' stages.sft.policy=new evaluation.texts=0."
        )

    def _items(self, noun: str, split: str, item: Callable[[Row], Any]) -> Sequence[Any]:
        _check_split(split)
        if (noun, split) not in self._split:
            left_out = Counter[str]()
            kept: list[Any] = []
            for row in self._read(noun):
                if reason := self._mixed(row) or (_says_nothing(row) if noun == COMPARISONS else None):
                    left_out[reason] += 1
                elif self._heldout(row) == (split == "heldout"):
                    kept.append(item(row))
            if left_out and not any(noun == known for known, _ in self._split):  # once for both splits
                reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
                print(visible(f"data.folder: {noun} left out of {self.config.folder}: {reasons}."))
            self._split[noun, split] = tuple(kept)
        return self._some(noun, split, self._split[noun, split])

    def _some(self, noun: str, split: str, items: Sequence[Any]) -> Sequence[Any]:
        """Return the items.

        Raises:
          MissingData: there are none.
        """
        if items:
            return items
        c = self.config
        if noun in NOUNS and not self._read(noun):
            raise MissingData(f"The rounds in {c.folder} have no {noun}. They have: {self._present()}. {_INSTEAD[noun]}")
        raise MissingData(
            f"The {split} split of the {noun} in {c.folder} is empty. Collect more, or change "
            f"data.heldout_fraction={c.heldout_fraction:g}, data.heldout_labelers={c.heldout_labelers:g} or "
            f"data.heldout_groups=[{', '.join(c.heldout_groups)}]."
        )

    def _present(self) -> str:
        return listing(f"{len(self._read(noun))} {noun}" for noun in NOUNS if self._read(noun))

    def _read(self, noun: str) -> list[Row]:
        """All rows of a noun. If a labeler revised a task within a round, only the last revision; if a task was adjudicated, only
        the adjudicator's row.

        Raises:
          DataError: a row is damaged, or its messages are not a prompt.
        """
        if noun not in self._rows:
            self._rows[noun] = []
            for folder in rounds.rounds_in(self.config.folder):
                last: dict[Any, Row] = {}
                for i, row in enumerate(rounds.of_round(folder, noun)):
                    if noun != CONVERSATIONS and row["messages"][-1]["role"] == "assistant":
                        raise DataError(
                            f"{folder / noun}.jsonl: the messages of '{short(row['id'])}' end with the assistant's turn."
                        )
                    last[i if row.get("labeler") is None else (row["id"], row["labeler"], _task(row))] = row
                settled = {_task(row) for row in last.values() if row.get("adjudicated")}
                self._rows[noun] += [row for row in last.values() if row.get("adjudicated") or _task(row) not in settled]
        return self._rows[noun]

    # ----------------------------------------------------------------------------------------------------- the split

    @property
    def _by_labeler(self) -> bool:
        return self.config.heldout_labelers > 0 or bool(self.config.heldout_groups)

    def _heldout(self, row: Row) -> bool:
        """True if the row's prompt is held out. If labelers are held out too, the row's labeler is on the same side, unless the
        row is `_mixed`."""
        return self._drawn(f"\n{_beginning(row)}", self.config.heldout_fraction)

    def _mixed(self, row: Row) -> str | None:
        if not self._by_labeler or self._heldout(row) == self._labeler_heldout(row):
            return None
        return "by training labelers on held-out prompts" if self._heldout(row) else "by held-out labelers on training prompts"

    def _labeler_heldout(self, row: Row) -> bool:
        c = self.config
        return row.get("group") in c.heldout_groups or self._drawn(f"labeler\n{row.get('labeler')}", c.heldout_labelers)

    def _drawn(self, text: str, share: float) -> bool:
        digest = hashlib.blake2b(f"{self.config.seed}{text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64


_INSTEAD: Mapping[str, str] = {
    DEMONSTRATIONS: "Leave out the sft stage ('~stages.sft') and start the others from your policy, or let people write some.",
    COMPARISONS: "Leave out the reward stage, or let people compare some answers.",
}


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(
            f"Rounds have no split '{short(split)}'.{did_you_mean(split, SPLITS)} They have: {listing(SPLITS)}. If it is an "
            "evaluation that asks for it, type 'evaluation.splits=[heldout]'."
        )


def _prompt(row: Row) -> Prompt:
    """The row's prompt: its messages, or of a conversation those before the first answer."""
    messages = [Message(each["role"], each["content"]) for each in row["messages"]]
    if rounds.noun_of(row) == CONVERSATIONS:
        end = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
        messages = messages[:end]
    return Prompt(tuple(messages))


def _task(row: Row) -> str:
    """What was asked, whatever its id: in old rounds over several runs, ids are there twice."""
    return json.dumps([row["messages"], row.get("completions")])


def _beginning(row: Row) -> str:
    messages = row["messages"]
    return str(next((each["content"] for each in messages if each["role"] == "user"), messages[0]["content"]))


def _comparison(row: Row) -> Comparison:
    return Comparison(_prompt(row), tuple(row["completions"]), tuple(row["ranks"]), row.get("labeler"), row.get("group"))


def _says_nothing(row: Row) -> str | None:
    return "ties of all" if len(set(row["ranks"])) == 1 else "of equal completions" if len(set(row["completions"])) == 1 else None
