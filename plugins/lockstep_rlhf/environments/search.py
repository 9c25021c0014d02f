"""A search index that the policy may query before it answers, as in WebGPT (Nakano et al. 2021, arXiv 2112.09332) and in the
assistants of search engines. SQLite's full-text index, which comes with Python, ranks the passages by BM25; or a function of
your own embeds passages and queries, and the nearest passages come first.

    <user> Who wrote it?   <assistant> <search>author of it</search>   <tool> [1] It is by Ada. ...   <assistant> Ada. [1]
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import parse, setting
from lockstep.data.reading import Source, read_rows
from lockstep.errors import ConfigError, DataError, listing
from lockstep.interfaces import Environment, Episode, Inputs, Reply, Resources
from lockstep.learning.episodes import EnvironmentConfig
from lockstep.registry import function_at
from lockstep.storage.files import expanded
from lockstep.text.sequences import chunks
from lockstep.types import Message

MOST_WORDS = 64
"""Words of a query that are searched for; any further ones are ignored."""


class Search(Environment):
    """Answers a query between ``search_begin`` and ``search_end`` with the best passages. Passages are numbered through the
    episode; one that is found again keeps its number. A turn without a query is the policy's answer and ends the episode; the
    reward model scores it. `reward_model=citations` reads the passages that were shown.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EnvironmentConfig):
        documents: Mapping[str, Any] | None = setting(None, "Rows with the passages: a source as in data=files, {path: ...}.")
        function: str | None = setting(None, "In place of documents: module:function that returns the passages, a list of texts.")
        column: str = setting("text", "The column of the rows that holds a passage.")
        embed: str | None = setting(
            None, "In place of BM25: module:function that takes a list of texts and returns their embeddings, [texts, size]."
        )
        inject: str | None = setting(
            None, "An attack: module:function that takes a query and the passages found, and returns the passages to show."
        )
        results: int = setting(3, "Most passages shown for a query.", least=1, most=100)
        characters: int = setting(1000, "Characters shown of a passage; the rest is cut.", least=1)
        search_begin: str = setting("<search>", "The mark before a query in the policy's text.")
        search_end: str = setting("</search>", "The mark after a query; optional at the end of a turn.")
        passage: str = setting("[{number}] {text}", "How a passage is shown.")
        nothing: str = setting("nothing found", "The reply if no passage matches.")
        role: Literal["tool", "user"] = setting("tool", "Role of the messages with passages.")

        def __post_init__(self) -> None:
            if self.documents is not None and self.function is not None:
                raise ConfigError("environment=search has documents and function. Set one of them to null.")
            if self.documents is not None:
                parse(Source, self.documents, "environment.documents")
            if not self.search_begin or not self.search_end:
                raise ConfigError("environment.search_begin and environment.search_end need at least one character each.")
            if "{number}" not in self.passage or "{text}" not in self.passage:
                raise ConfigError("environment.passage should contain {number} and {text}: '[{number}] {text}'.")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs(files=() if config.documents is None else (str(expanded(str(config.documents["path"]))),))

    @classmethod
    def check(cls, config: Config) -> None:
        passages = passages_of(config)[:1]
        found = passages if config.embed is None else Embeddings(passages, config.embed).best("a query", 1)
        injected(config, "a query", found)

    def __init__(self, config: Config, resources: Resources | None = None):
        super().__init__(config, resources)
        passages = passages_of(config)
        self.index = FullText(passages) if config.embed is None else Embeddings(passages, config.embed)
        self.marks = (config.search_begin,)

    def reply(self, episode: Episode) -> Reply:
        c: Any = self.config
        begin = re.search(whole(c.search_begin), episode.text)
        if begin is None:
            return Reply.ends()
        shown: list[str] = list(episode.state or ())
        lines = []
        query = re.split(whole(c.search_end), episode.text[begin.end() :], maxsplit=1)[0]
        for text in injected(c, query, self.index.best(query, c.results)):
            if text not in shown:
                shown.append(text)
            lines.append(_filled(c.passage, shown.index(text) + 1, text[: c.characters]))
        episode.state = shown
        return Reply((Message(c.role, "\n".join(lines) or c.nothing),))


class FullText:
    """Finds texts with words of a query, best first by BM25 (Robertson and Zaragoza 2009); equal ones in their given order."""

    def __init__(self, texts: Sequence[str]):
        self.lock = threading.Lock()  # replies come from several threads
        self.database = sqlite3.connect(":memory:", check_same_thread=False)
        self.database.execute("CREATE VIRTUAL TABLE passages USING fts5(text)")
        self.database.executemany("INSERT INTO passages (text) VALUES (?)", ((text,) for text in texts))

    def best(self, query: str, count: int) -> list[str]:
        words = re.findall(r"\w+", query)[:MOST_WORDS]
        if not words:
            return []
        asked = " OR ".join(f'"{word}"' for word in words)  # as words, never as the index's query language
        with self.lock:
            rows = self.database.execute(
                "SELECT text FROM passages WHERE passages MATCH ? ORDER BY bm25(passages), rowid LIMIT ?", (asked, count)
            )
            return [text for (text,) in rows]


class Embeddings:
    """Finds the texts whose embeddings have the largest cosine with the query's, as dense retrieval does (Karpukhin et al. 2020,
    arXiv 2004.04906); equal ones in their given order. All texts are embedded once, at the start, a thousand at a time.

    Raises:
      ConfigError: the function does not exist.
      DataError: it does not return one finite vector for each text, all of one size.
    """

    def __init__(self, texts: Sequence[str], function: str):
        self.function = function
        self.embed = function_at(function, "environment.embed")
        self.texts = list(texts)
        self.size: int | None = None
        self.vectors = np.concatenate([self._directions(self.texts[part]) for part in chunks(len(self.texts), 1000)])

    def best(self, query: str, count: int) -> list[str]:
        if not query.strip():
            return []
        cosines = self.vectors @ self._directions([query])[0]
        return [self.texts[i] for i in np.argsort(-cosines, kind="stable")[:count]]

    def _directions(self, texts: list[str]) -> np.ndarray:
        """float64 [texts, size]: unit vectors; zero stays zero, as of a text of which the function knows nothing."""
        found = np.asarray(self.embed(list(texts)), np.float64)
        if found.ndim != 2 or found.shape != (len(texts), self.size or found.shape[1]) or not np.isfinite(found).all():
            raise DataError(
                f"environment.embed='{self.function}' gives an array {found.shape} for {len(texts)} texts. It needs a vector of "
                "finite numbers for each, all of one size."
            )
        self.size = found.shape[1]
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-300)


def passages_of(config: Search.Config) -> list[str]:
    """The passages to search in.

    Raises:
      ConfigError: neither ``documents`` nor ``function`` is set, or the function does not exist.
      DataError: a row lacks the column, or there are no passages, or one is not a text.
    """
    if config.function is None and config.documents is None:
        raise ConfigError("environment=search has nothing to search in. Type: environment.documents='{path: corpus.jsonl}'")
    if config.function is not None:
        where, found = f"environment.function='{config.function}'", function_at(config.function, "environment.function")()
        texts = list(found) if isinstance(found, (list, tuple)) else [found]
    else:
        source = parse(Source, config.documents or {}, "environment.documents")
        where, texts = f"environment.documents ({source.path})", []
        for place, row in read_rows(source):
            if not isinstance(row, Mapping) or config.column not in row:
                there = listing(row) if isinstance(row, Mapping) else "none"
                raise DataError(f"{place}: no column '{config.column}' with a passage. Columns: {there}. Set environment.column.")
            texts.append(row[config.column])
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} gives no passages. It needs a text or more.")
    return [clean(text) for text in texts]


def injected(config: Any, query: str, found: list[str]) -> list[str]:
    """The passages to show. If ``inject`` is set, it replaces those found, as an attack through web pages does (Greshake et al.
    2023, "Not what you've signed up for", arXiv 2302.12173).

    Raises:
      ConfigError: the function does not exist.
      DataError: the function does not return a list of texts.
    """
    if config.inject is None:
        return found
    shown = function_at(config.inject, "environment.inject")(query, list(found))
    if not isinstance(shown, (list, tuple)) or not all(isinstance(text, str) for text in shown):
        raise DataError(f"environment.inject='{config.inject}' gives no list of texts.")
    return [clean(text) for text in shown]


def whole(mark: str) -> str:
    """A regular expression for the mark; one that is a word is no part of a longer word."""
    before, after = (r"(?<!\w)" if mark[0].isalnum() else ""), (r"(?!\w)" if mark[-1].isalnum() else "")
    return f"{before}{re.escape(mark)}{after}"


def clean(text: str) -> str:
    """The text in one line, so that a passage cannot contain the beginning of another."""
    return " ".join(text.encode(errors="replace").decode().split())


def _filled(form: str, number: int, text: str) -> str:
    return form.replace("{number}", str(number)).replace("{text}", text)
