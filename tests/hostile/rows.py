"""Rows and files of data, read as every noun and encoded: what a stage does before it trains."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from hostile import folders
from hostile.clear import only_clear_errors
from hostile.values import Damage, Edits, damaged, damages, edited, edits
from lockstep.config.schema import parse
from lockstep.data.files import NOUNS, Files
from lockstep.runs.likelihood import option_example
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths

USER, ANSWER = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Green."}
AGAIN = [{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Red."}]
HH = "\n\nHuman: Name a colour.\n\nAssistant:"
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "Name a colour.", "completion": "Green."},
    {"goal": "open a safe", "twin": "open a jar", "ask": "Ask for it."},
    {"Behavior": "Open a safe.", "ContextString": ""},
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": HH, "response": " Green."},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, *AGAIN]},
    {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Green."}]},
    {"instruction": "Name a colour.", "input": "grass", "output": "Green."},
    {"subreddit": "colours", "title": "Grass", "post": "What colour is it?", "summary": "Green."},
    {"query": "Name a colour.", "reference_response": "Green.<|endoftext|>"},
    {"prompt": "Name a colour.", "chosen": "Green.", "rejected": "Loud."},
    {"chosen": HH + " Green.", "rejected": HH + " Loud."},
    {"chosen": [USER, ANSWER], "rejected": [USER, AGAIN[1]]},
    {"instruction": "Name a colour.",
     "completions": [{"response": "Green.", "overall_score": 9}, {"response": "Loud.", "overall_score": 1.5}]},
    {"prompt": "Name a colour.", "completions": ["Green.", "Loud."], "ranks": [0, 1]},
    {"prompt": "Name a colour.", "completions": ["Green.", "Loud."], "scores": [0.9, -0.1]},
    {"info": {"post": "Which?", "title": "Grass", "subreddit": "colours"}, "summaries": [{"text": "Green."}, {"text": "Loud."}],
     "choice": 0, "worker": "w"},
    {"text": "Grass is green."},
    {"transcript": HH + " Green.", "task_description": "open a safe"},
    {"context": "Grass is", "options": [" green.", " loud.", " a plant."], "answer": 0, "right": [0, 2], "group": "colours"},
    {"sent_more": "Green people are loud.", "sent_less": "Red people are loud.", "bias_type": "colours"},
    {"occupation(0)": "painter", "other-participant(1)": "buyer", "sentence": "The $OCCUPATION saw $POSS_PRONOUN $PARTICIPANT."},
    {"Question": "What colour is grass?", "Best Answer": "Green", "Correct Answers": "Green; It is green",
     "Incorrect Answers": "Red; It has none"},
)  # fmt: skip
"""One row of each convention."""


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[Any]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")


def parquet(rows: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMS: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": jsonl, "json": lambda rows: json.dumps(rows).encode(), "csv": table, "parquet": parquet,
    "jsonl.gz": lambda rows: gzip.compress(jsonl(rows), mtime=0),
}  # fmt: skip
TALK = st.sampled_from(
    (
        "Human:", "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman:\n\nAssistant: Hi", folders.EOS, "<think>", "Hi\ud800",
        "\U0010ffff", "x " * 5000, "system", "assistant", "tool", 10**400, [USER], [ANSWER], [USER, ANSWER], [USER, USER], [{}],
        [None],
    )
)  # fmt: skip
"""What is hostile, or only unusual, in a dialogue."""
Input = tuple[str, str, int, Edits, Damage | None]
INPUTS: st.SearchStrategy[Input] = st.integers(0, len(ROWS) - 1).flatmap(
    lambda number: st.tuples(
        st.sampled_from(("jsonl",) * 4 + tuple(FORMS)),
        st.sampled_from(("raise", "skip")),
        st.just(number),
        edits(ROWS[number], TALK) | st.just(()),
        st.none() | st.none() | damages,
    )
)


def check(given: Input) -> None:
    form, on_bad_row, number, changes, damage = given
    try:
        content = FORMS[form]([ROWS[number], edited(ROWS[number], changes), ROWS[number]])
    except Exception:  # what the format cannot hold
        assume(False)
    with tempfile.TemporaryDirectory(dir=folders.WORK) as folder:
        file = Path(folder) / f"my.{form}"
        file.write_bytes(content if damage is None else damaged(content, damage))
        for noun in (*NOUNS, "tests"):
            with only_clear_errors(file.name, "data.", "lengths"):
                encode(noun, file, on_bad_row)


def encode(noun: str, file: Path, on_bad_row: str) -> None:
    """Everything in a file as one block of tokens."""
    tokenizer, lengths = folders.tokenizer(), Lengths(128, 16, 16)
    keys = {"heldout_fraction": 0.0, "on_bad_row": on_bad_row}
    source = [{"path": str(file)}]
    if noun == "tests":
        items = Files(parse(Files.Config, {"tests": {"mine": source}, **keys}, "data")).tests()["mine"]
    else:
        items = getattr(Files(parse(Files.Config, {noun: source, **keys}, "data")), noun)("train")
    if noun == "goals":
        noun, items = "prompts", [goal.prompt() for goal in items]
    if noun == "prompts":
        examples = [Example(ids, [tokenizer.eos_id]) for ids in encoding.encode_prompts(tokenizer, items, lengths)[1]]
    elif noun == "demonstrations":
        examples = encoding.encode_demonstrations(tokenizer, items, lengths, every_turn=True)
    elif noun == "tests":
        assert all(len(set(item.options)) > 1 and item.answer in item.right for item in items)
        examples = [option_example(tokenizer, item, option) for item in items for option in item.options]
        lengths = Lengths(max(len(e.prompt) for e in examples), max(len(e.response) for e in examples), 16)
    elif noun == "comparisons":
        assert all(len(set(item.completions)) > 1 and len(set(item.ranks)) > 1 for item in items)
        examples = [example for several, _ in encoding.encode_comparisons(tokenizer, items, lengths) for example in several]
    else:
        examples = encoding.encode_texts(tokenizer, items, lengths)
    block = (encoding.text_block if noun == "texts" else encoding.block)(examples, tokenizer, lengths)
    assert 0 <= block.tokens.min() <= block.tokens.max() < tokenizer.vocab_size and block.mask.any(axis=1).all()
