"""The data source ``files``: training and test data from files and Hugging Face data sets.

The beginning of a dialogue decides whether it is held out: its first user message (for a raw text or a goal, all of it) is
hashed with the seed. So no prompt is in both splits, and neither are two moments of one dialogue. A prompt falls in the same
split whether it comes alone, in a demonstration or in a comparison. Position does not matter: adding, removing and sorting
rows moves no other row to the other split.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lockstep.config.overrides import override
from lockstep.config.schema import parse, setting
from lockstep.data.cells import BadRow, LeftOut
from lockstep.data.columns import reader, unread
from lockstep.data.conventions import WITHOUT_PROMPTS
from lockstep.data.messages import without
from lockstep.data.mixing import mix, row_counts
from lockstep.data.reading import Row, Source, has, parse_split, read_rows, source_digest
from lockstep.errors import ConfigError, DataError, MissingData, Unreachable, did_you_mean, listing, short
from lockstep.interfaces import DataSource
from lockstep.storage.files import expanded
from lockstep.text.visible import visible
from lockstep.types import Choice, Comparison, Demonstration, Goal, Prompt

NOUNS = ("demonstrations", "comparisons", "prompts", "texts", "goals")
WITH_PROMPTS = ("demonstrations", "comparisons", "prompts")
SPLITS = ("train", "heldout")
FIRST = 100
"""How many rows of a hub data set a dry run reads."""

Items = tuple[Any, ...]

_SOURCES = "Sources, each a group of the keys of `Source`; null: none."
_OWN = "Sources of the held-out split; null: a fraction of the others."


@dataclass(frozen=True)
class Config:
    """The sources of each noun, in each split."""

    demonstrations: tuple[Mapping[str, Any], ...] | None = setting(None, _SOURCES)
    comparisons: tuple[Mapping[str, Any], ...] | None = setting(None, _SOURCES)
    prompts: tuple[Mapping[str, Any], ...] | None = setting(None, _SOURCES)
    texts: tuple[Mapping[str, Any], ...] | None = setting(None, _SOURCES)
    goals: tuple[Mapping[str, Any], ...] | None = setting(None, _SOURCES)
    heldout_demonstrations: tuple[Mapping[str, Any], ...] | None = setting(None, _OWN)
    heldout_comparisons: tuple[Mapping[str, Any], ...] | None = setting(None, _OWN)
    heldout_prompts: tuple[Mapping[str, Any], ...] | None = setting(None, _OWN)
    heldout_texts: tuple[Mapping[str, Any], ...] | None = setting(None, _OWN)
    heldout_goals: tuple[Mapping[str, Any], ...] | None = setting(None, _OWN)
    splits: Mapping[str, tuple[Mapping[str, Any], ...]] = setting(
        {}, "Sources of prompts only for evaluation, by names of your choice for `evaluation.splits`."
    )
    tests: Mapping[str, tuple[Mapping[str, Any], ...]] = setting(
        {}, "Sources of items with options, by names of your choice: every evaluated policy takes these tests."
    )
    heldout_fraction: float = setting(0.05, "Fraction of prompts to hold out if that split has no sources.", least=0, below=1)
    seed: int = setting(0, "Seed of the split; not the run's seed, so that runs with several seeds share the split.", least=0)
    on_bad_row: Literal["raise", "skip"] = setting("raise", "Stop and name the file and line; or skip, and report how many.")
    every_source: Mapping[str, Any] = setting(
        {"split": "train", "weight": None, "config": None, "revision": None, "ignore": [], "where": {}, "columns": []},
        "Default keys of every source; a source may override them.",
    )

    def __post_init__(self) -> None:
        for group in ("splits", "tests"):
            for name in getattr(self, group):
                if not re.fullmatch(r"[a-z]\w*", name) or name in SPLITS or name.endswith("_twins"):
                    raise ConfigError(
                        f"data.{group} has '{short(name)}'. Name it with small letters, digits and _, not train or heldout, and "
                        "without _twins at its end."
                    )
        _all_sources(self)


_Config = Config


class Files(DataSource):
    """Reads each noun once, on first use. If ``first`` is given, reads only that many rows of hub data sets.

    Raises:
      ConfigError: the sources contradict each other; this is checked before any file is opened.
    """

    Config = Config

    def __init__(self, config: _Config, first: int | None = None):
        self.config = config
        self.sources = _all_sources(config)
        self.first = first
        self._read: dict[str, dict[str, Items]] = {}
        self._items: dict[tuple[str, int], Items] = {}

    @classmethod
    def preview(cls, config: _Config) -> Files:
        return cls(config, first=FIRST)

    def survey(self) -> Iterator[tuple[str, str | Unreachable]]:
        for key, sources in self.sources.items():
            for index, source in enumerate(sources):
                try:
                    found: str | Unreachable = f"{len(self.items(key, index))} {_counted(key)} in {source.path}"
                except Unreachable as error:
                    found = error
                yield f"data.{key}[{index}]", found

    @classmethod
    def fingerprint(cls, config: _Config) -> str | None:
        """A hash of the local files: a stage is not reused if one of them has changed."""
        found = [source_digest(source) for sources in _all_sources(config).values() for source in sources]
        return hashlib.sha256(" ".join(each or "hub" for each in found).encode()).hexdigest() if any(found) else None

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        return self._split("demonstrations", split)

    def comparisons(self, split: str) -> Sequence[Comparison]:
        return self._split("comparisons", split)

    def prompts(self, split: str) -> Sequence[Prompt]:
        return self._named("splits", split) if split in self.config.splits else self._split("prompts", split)

    def texts(self, split: str) -> Sequence[str]:
        return self._split("texts", split)

    def goals(self, split: str) -> Sequence[Goal]:
        return self._split("goals", split)

    def tests(self) -> Mapping[str, Sequence[Choice]]:
        return {name: self._named("tests", name) for name in self.config.tests}

    def _named(self, group: str, name: str) -> Items:
        key = f"{group}.{name}"
        return tuple(itertools.chain.from_iterable(self.items(key, i) for i in range(len(self.sources[key]))))

    def _split(self, noun: str, split: str) -> Items:
        if split not in SPLITS:
            known = [*SPLITS, *(self.config.splits if noun == "prompts" else ())]
            raise DataError(
                f"Files have no split '{short(split)}' of {noun}.{did_you_mean(split, known)} They have: {', '.join(known)}."
            )
        self._require(noun, split)
        if noun not in self._read:
            self._read[noun] = self._read_noun(noun)
        if not self._read[noun][split]:
            if self.first is not None and not all(expanded(s.path).exists() for s in self.sources[noun]):
                raise Unreachable(f"none of the first {self.first} rows of data.{noun} is in the {split} split")
            raise DataError(
                f"The {split} split of data.{noun} is empty: all rows are in the other one, or another kind of data holds them "
                f"out. Give it more rows, or change data.heldout_fraction={self.config.heldout_fraction}, data.heldout_{noun}, "
                "or what the others hold out."
            )
        return self._read[noun][split]

    def _require(self, noun: str, split: str) -> None:
        """Raises MissingData unless the split has sources."""
        own = self.sources[f"heldout_{noun}"]
        if split == "heldout" and self.sources[noun] and not own and self.config.heldout_fraction == 0:
            raise MissingData(
                f"No {noun} are held out. Set data.heldout_fraction=0.05 or {_sources_of(f'heldout_{noun}', 'test.jsonl')}."
            )
        if not self.sources[noun] and not (own and split == "heldout"):
            raise MissingData(f"This run needs {noun}. Set {_sources_of(noun, 'my.jsonl')}.")

    def _read_noun(self, noun: str) -> dict[str, Items]:
        """Both splits of a noun. The held-out split is a fraction of the rows, or has sources of its own. A row that begins like
        a prompt of ``splits`` is not trained on."""
        parts = self._apart([self.items(noun, i) for i in range(len(self.sources[noun]))], noun)
        heldout = self._parts(f"heldout_{noun}") or [_only(part, self._in_fraction) for part in parts]
        return {"train": self._mixed(noun, self._trained_on(noun, parts)), "heldout": mix(heldout)}

    def _parts(self, key: str) -> list[Items]:
        return [self.items(key, i) for i in range(len(self.sources[key]))]

    def _trained_on(self, noun: str, parts: Sequence[Items]) -> Sequence[Items]:
        """The parts without items that begin like a held-out one of this noun, or of any noun whose items begin with prompts if
        this one's do: what SFT learned by heart tells nothing of a reward model, nor of PPO."""
        alike = WITH_PROMPTS if noun in WITH_PROMPTS else (noun,)
        for each in alike:
            if held := self._parts(f"heldout_{each}"):
                what = "held-out ones" if each == noun else f"rows of data.heldout_{each}"
                parts = self._without(parts, itertools.chain(*held), noun, what)
        by_fraction = [each for each in alike if self.sources[each] and not self.sources[f"heldout_{each}"]]
        if not by_fraction:
            return parts
        kept = [_only(part, lambda item: not self._in_fraction(item)) for part in parts]
        left_out = sum(map(len, parts)) - sum(map(len, kept))
        if left_out and noun not in by_fraction:
            others = listing(f"data.{each}" for each in by_fraction)
            print(
                f"data.{noun}: {left_out} training rows were left out because data.heldout_fraction holds them out of {others}."
            )
        return kept

    def _apart(self, parts: Sequence[Items], noun: str) -> Sequence[Items]:
        """The parts without items that begin like a prompt of a split that is only for evaluation."""
        for name in self.config.splits if noun != "texts" else ():
            parts = self._without(parts, self._named("splits", name), noun, f"prompts of data.splits.{name}")
        return parts

    @staticmethod
    def _without(parts: Sequence[Items], others: Iterable[Any], noun: str, what: str) -> list[Items]:
        beginnings = {_beginning(item) for item in others}
        kept = [_only(part, lambda item: _beginning(item) not in beginnings) for part in parts]
        if count := sum(map(len, parts)) - sum(map(len, kept)):
            print(f"data.{noun}: {count} training rows were left out because they begin like {what}.")
        return kept

    def _in_fraction(self, item: Any) -> bool:
        digest = hashlib.blake2b(f"{self.config.seed}\n{_beginning(item)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.config.heldout_fraction * 2**64

    def items(self, key: str, index: int) -> Items:
        """All items of one source under ``comparisons``, ``heldout_comparisons``, ... Prints how many rows were left out, and
        why."""
        if (key, index) not in self._items:
            self._items[key, index] = self._read_source(key, index)
        return self._items[key, index]

    def _read_source(self, key: str, index: int) -> Items:
        source, where, noun = self.sources[key][index], f"data.{key}[{index}]", _noun(key)
        every = list(read_rows(source, self.first))
        rows = [(place, without(row, source.ignore)) for place, row in every if has(row, source.where)]
        if not rows and every and self.first is not None and not expanded(source.path).exists():
            raise Unreachable(f"none of the first {self.first} rows is as {where}.where asks")
        if not rows:
            raise DataError(_no_rows(where, source, every))
        place, first = next((row for row in rows if isinstance(row[1], Mapping)), rows[0])
        items, left_out = self._usable(rows, reader(noun, first, place, source.columns))
        columns = dict.fromkeys(name for _, row in rows if isinstance(row, Mapping) for name in row)
        if beside := unread(noun, first, list(columns), (*source.columns, *source.where)):
            print(visible(f"{where}: of {source.path}, columns that are not read: {listing(beside)}."))
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        summary = f"{where}: {len(items)} of {len(rows)} rows of {source.path} can be used; left out: {reasons}."
        if not items:
            raise DataError(summary)
        if left_out:
            print(visible(summary))
        return items

    def _usable(self, rows: Sequence[Row], read: Callable[[Any], Any]) -> tuple[Items, Mapping[str, int]]:
        """The items of the rows, and how often each reason left one out."""
        items, left_out = [], collections.Counter[str]()
        for place, row in rows:
            try:
                items.append(read(row))
            except LeftOut as reason:
                left_out[str(reason)] += 1
            except BadRow as bad:
                if self.config.on_bad_row == "raise":
                    hint = "Correct the row, or leave such rows out with data.on_bad_row=skip."
                    raise DataError(f"{place}: {bad} {hint}") from None
                left_out[f"with {bad.problem}"] += 1
        return tuple(items), left_out

    def _mixed(self, noun: str, parts: Sequence[Items]) -> Items:
        """The training mixture. If the sources have weights, prints how often an epoch passes through each source."""
        sources = self.sources[noun]
        if not parts or sources[0].weight is None:
            return mix(parts)
        if not all(parts):
            empty = next(i for i, part in enumerate(parts) if not part)
            raise DataError(f"data.{noun}[{empty}] ({sources[empty].path}) has a weight, but all of its rows are held out.")
        weights = [source.weight for source in sources]
        counts = row_counts([len(part) for part in parts], weights)
        passes = (
            f"{source.path} {count / len(part):.1f} times" for source, count, part in zip(sources, counts, parts, strict=True)
        )
        print(visible(f"data.{noun}: one epoch is {sum(counts)} rows, going through {', '.join(passes)}."))
        return mix(parts, weights)


def _sources_of(noun: str, path: str) -> str:
    """The override that a user types to set sources of this noun."""
    return override(f"data.{noun}", [{"path": path}])


def _all_sources(config: Config) -> dict[str, tuple[Source, ...]]:
    """{key: its checked sources} for the keys 'comparisons', 'heldout_comparisons', 'splits.NAME', ..."""
    given = {key: getattr(config, key) for noun in NOUNS for key in (noun, f"heldout_{noun}")}
    given |= {f"{group}.{name}": each for group in ("splits", "tests") for name, each in getattr(config, group).items()}
    return {key: _sources(config, key, each or ()) for key, each in given.items()}


def _no_rows(where: str, source: Source, every: Sequence[Row]) -> str:
    if not every:
        return f"{source.path} has no rows in '{source.split}': {where} needs at least one."
    wanted = ", ".join(f"{name}: {value}" for name, value in source.where.items())
    columns = next((row for _, row in every if isinstance(row, Mapping)), {})
    return f"No row of {source.path} has {{{short(wanted)}}}, which {where}.where asks for. Its columns: {listing(columns)}."


def _counted(key: str) -> str:
    """What to call the items under a key, after their number."""
    group, _, name = key.partition(".")
    return {"splits": f"prompts of the split {name}", "tests": f"items of the test {name}"}.get(group, key)


def _noun(key: str) -> str:
    group = key.partition(".")[0]
    return "prompts" if group == "splits" else group.removeprefix("heldout_")


def _sources(config: Config, key: str, given: Sequence[Mapping[str, Any]]) -> tuple[Source, ...]:
    """
    Raises:
      ConfigError: the sources contradict each other.
    """
    sources = tuple(parse(Source, {**config.every_source, **keys}, f"data.{key}[{i}]") for i, keys in enumerate(given))
    weights = [source.weight for source in sources]
    if (key.startswith("heldout_") or "." in key) and any(weight is not None for weight in weights):
        raise ConfigError(f"data.{key} has a weight, but every held-out row is used exactly once. Set weight=null.")
    if None in weights and any(weight is not None for weight in weights):
        raise ConfigError(f"data.{key}: give every source a weight, or none. Given: {weights}.")
    for i, (source, keys) in enumerate(zip(sources, given, strict=True)):
        parse_split(source.split)
        if _noun(key) in WITHOUT_PROMPTS and keys.get("columns"):
            what = WITHOUT_PROMPTS[_noun(key)]
            raise ConfigError(f"data.{key}[{i}] has columns, but {what} have no prompt that could carry them. Remove the key.")
        if both := set(source.columns) & set(source.ignore):
            raise ConfigError(f"data.{key}[{i}] both reads and ignores {listing(both)}. Remove it from columns or from ignore.")
    return sources


def _beginning(item: Any) -> str:
    """The text that decides an item's split."""
    if isinstance(item, str):
        return item
    if isinstance(item, Goal):
        return item.text
    messages = (item if isinstance(item, Prompt) else item.prompt).messages
    return next((message.content for message in messages if message.role == "user"), messages[0].content)


def _only(items: Items, wanted: Callable[[Any], bool]) -> Items:
    return tuple(item for item in items if wanted(item))
