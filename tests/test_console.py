"""What is shown: names, data, models and servers may contain anything, and none of it steers the terminal or the report."""

from __future__ import annotations

import io
import logging
import random
import re
import sys

import pytest

from lockstep.commands import chat
from lockstep.reporting import summary
from lockstep.reporting.console import Console, Terminal, show_bug
from lockstep.reporting.markdown import escaped
from lockstep.storage.files import write_json
from lockstep.text.visible import visible

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\x85"
UNSAFE = [chr(c) for c in (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2060, 0x2070))]
UNSAFE += ["\u2028", "\u2029", "\u200b", "\u200e", "\u200f", "\ufeff", "\u061c", "\xad", "\ud800", "\udfff", "\U000e0041"]
NAMES = ["[red]x[/]", "[/]", "[bold", "a[b]", ":ok:", ":smiley:", "[link=http://x]y[/link]", "\\[x]", "{x}", "%s", "123 'a' None"]


def screen(monkeypatch):
    """A terminal with colours in place of standard output; returns a function that returns what was written to it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    return lambda: stream.buffer.getvalue().decode()


def bare(text: str) -> str:
    """Without Rich's own colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def every_way_to_show(name: str) -> None:
    console = Console()
    console.say(f"say {name}")
    console.plan(name, [(name, name, name)])
    console.stage_done(name, {"seconds": 1.0, "metrics": {}}, reused=False)
    logging.getLogger("lockstep").warning("warn %s", name)
    with console.progress(name, 0, 2) as progress:
        progress(1, {}, name)


def test_text_that_is_safe_stays_as_it_is():
    for text in (
        "plain\ttext\nline",
        "naïve café",
        "日本語",
        "عربي",
        "می‌خواهم",
        "👩‍👩‍👧",
        "क्‍ष",
        "√KL ≤ 0.1",
        r"\x1b[31m",
        "“”–…",
    ):
        assert visible(text) == text
    assert visible("a\r\nb") == "a\nb"


@pytest.mark.parametrize("character", UNSAFE, ids=lambda c: f"U+{ord(c):04X}")
def test_characters_that_steer_or_hide_are_spelled_out(character):
    said = visible(f"a{character}b")
    assert character not in said and said == f"a{ascii(character)[1:-1]}b" and visible(said) == said


def test_no_text_steers_the_terminal(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lockstep"), "propagate", False)  # pytest's workers cannot send half a character
    printed = screen(monkeypatch)
    every_way_to_show(f"x{ESCAPES}\r\u202ey\ud800")
    out = bare(printed())
    assert r"say x\x1b[2J\x1b]0;owned\x07\x9b31m\x85\r\u202ey\ud800" in out
    # Of the bar's own codes, only these are left: its colours, the cursor up, hidden and shown, the line cleared.
    out = re.sub(r"\x1b\[(1A|2K|\?25[lh])|\r", "", out)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_markup_or_an_emoji(monkeypatch, name):
    printed = screen(monkeypatch)
    every_way_to_show(name)
    out = bare(printed())
    assert f"say {name}\n" in out and f"warn {name}" in out and f"run {name}" in out
    assert out.count(name) >= 8


def test_a_table_shows_names_as_they_are(monkeypatch, tmp_path):
    printed = screen(monkeypatch)
    name = "[red]x[/] :ok: \x1b[2J"
    measures = {"gold": {"mean": 1.0}, "score": {"mean": 1.0}}
    result = {"steps": 1, "seconds": 1.0, "metrics": {}, "output": {}, "health": [{"name": name, "message": name}]}
    result["evaluation"] = {"splits": {name: {name: measures}}, "reward_model": {name: {"mean": 1.0}}}
    stages = {name: {"folder": "stages/stage", "status": "done"}}
    run = {"name": "run", "experiment": "x", "seed": 0, "status": "done", "backend": {"name": "torch"}, "stages": stages}
    write_json(tmp_path / "run" / "run.json", run)
    write_json(tmp_path / "stages" / "stage" / "done.json", result)
    Console().out.print(summary.summary(tmp_path / "run"))
    assert bare(printed()).count("[red]x[/] :ok: \\x1b[2J") == 5


def test_secrets_are_shown_in_no_line(monkeypatch):
    printed = screen(monkeypatch)
    monkeypatch.setenv("REWARD_TOKEN", "hunter2hunter2")
    every_way_to_show("hunter2hunter2 http://h/?key=hunter2 reward_model.api_key=hunter2")
    assert "hunter2" not in printed() and "***" in printed()


def test_a_traceback_neither_steers_the_terminal_nor_shows_secrets(capsys):
    try:
        {}["\x1b[2J http://h/?key=hunter2"]
    except KeyError as error:
        show_bug(type(error), ValueError("\x9b31m"), error.__traceback__)
        show_bug(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert r"\x9b31m" in said and "Traceback" in said and "key=***" in said
    assert "\x1b" not in said and "\x9b" not in said and "hunter2" not in said


def test_a_terminal_that_cannot_show_a_character_gets_its_code(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    Console().say("caf\xe9 → \ud800")
    assert stream.buffer.getvalue() == rb"caf\xe9 \u2192 \ud800" + b"\n"


def test_a_string_is_safe_in_every_part_of_a_table():
    from rich.table import Table

    stream, name = io.StringIO(), "[red]x[/] :ok: \x1b[2J"
    table = Table(title=name, caption=name)
    table.add_column(name, footer=name)
    table.add_row(name)
    table.show_footer = True
    Terminal(file=stream, width=100).print(table)
    assert stream.getvalue().count("[red]x[/] :ok: \\x1b[2J") == 5


@pytest.mark.parametrize(
    "pieces", [["\x1b", "[2J"], ["a\r", "b"], ["\x9b2J"], ["\x1b]52;c;aGk=\x07"], ["\u202etxt.exe"], ["\ud83d"]]
)
def test_what_a_model_says_does_not_steer_the_terminal(capsys, pieces):
    chat.write(iter_(pieces))
    out = capsys.readouterr().out
    assert out == visible("".join(pieces)) + "\n" and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud83d]", out)


def test_random_text_is_safe_and_in_markdown_holds_no_tag_link_or_cell():
    rng = random.Random(0)
    alphabet = [*UNSAFE, *"<>[]()!|*_`~\\&;#:/ \n\tab1", "script", "javascript:", "&lt;", "](", "👩", "ä"]
    for _ in range(700):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
        said = visible(text)
        assert not any(character in said for character in UNSAFE) and visible(said) == said
        line = escaped(text)
        assert "\n" not in line and not re.search(
            r"(?<!\\)(\\\\)*(?:\||`|\*)|<[A-Za-z/!?]|\][(\[:]|&#?\w+;(?<!&lt;)(?<!&amp;)", line
        ), (text, line)


def iter_(pieces):
    yield from pieces


# -------------------------------------------------------------------------------------------------------------- Markdown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("<javascript:alert(1)>", "&lt;javascript:alert(1)>"),
        ("<!-- x -->", "&lt;!-- x -->"),
        ("[x](javascript:alert(1))", r"[x]\(javascript:alert(1))"),
        ("[x][y]", r"[x]\[y]"),
        ("[x]: javascript:alert(1)", r"[x]\: javascript:alert(1)"),
        ("![x](http://h/i.png)", r"\![x]\(http://h/i.png)"),
        ("a | b", r"a \| b"),
        (r"a \| b", r"a \\\| b"),
        ("`code` **bold** _it_ ~~no~~", r"\`code\` \*\*bold\*\* \_it\_ \~\~no\~\~"),
        ("# title\n- item\r\n", r"\# title - item"),
        ("> quote", r"\> quote"),
        ("--- | ---", r"\--- \| ---"),
        ("&lt;b&gt; &#60; & x", "&amp;lt;b&amp;gt; &amp;#60; & x"),
        ("a\x1b[31mb", r"a\\x1b[31mb"),
    ],
)
def test_in_markdown_text_stays_text(text, shown):
    assert escaped(text) == shown


@pytest.mark.parametrize(
    "text", ["1.41 [1.30, 1.52]", "kl_coef=0.02", "-0.12 ±0.03", "gold: sft < ppo", "a & b", "100%", "seed 1, 2 (x)"]
)
def test_in_markdown_numbers_and_names_need_no_escape(text):
    assert escaped(text) == text
