"""Commands as they are typed: through a shell, argparse and Hydra. Those that pages, recipes and errors show must work."""

from __future__ import annotations

import functools
import random
import shlex
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from listings import ROOT, literals, overrides_in, shell_comments, shell_listings, typed
from lockstep import cli
from lockstep.commands.run import run
from lockstep.commands.run.sweeps import _first
from lockstep.config.compose import compose
from lockstep.config.overrides import override, read, shell
from lockstep.errors import ConfigError
from lockstep.models import checkpoint
from lockstep.runs.experiment import Experiment

# ---------------------------------------------------------------------------------------------------------- what is printed

VALUES = [
    "<|pad|>", "[PAD]", "</s>", "epoch=3-step=100", "~/m", "café/m", "my models/m", "日本/模型", "it's", "a'b\"c", "$HOME",
    "`ls`",
    "\\", "a\\", "\\'", "a\\\\'", "${x}", "\\${x}", "$", "!x", "#x", "a#b", "{{ m }}", "{% if a %}", "null", "true", "1", "1.5",
    "1e5", ".5", "nan", "inf", "-1", "-x", "", " ", " a ", "a,b", "(a)", "a:b", "http://h:1/a?b=c&d=e", "*", "?", "a;b", "a|b",
    "a>b",
    "tab\there", "two\nlines", "'", "\"", "''", "a=b", "%s", "@x", "+x", "NULL", "True", "0x10", "1_000", "é", "\u2028",
]  # fmt: skip


def drawn(count: int) -> list[str]:
    rng = random.Random(20)
    return ["".join(rng.choices("ab1 '\"\\${}[](),:=~#!*<>|é\n.-+/", k=rng.randint(1, 9))) for _ in range(count)]


def test_an_override_that_is_printed_arrives_as_its_value(tmp_path):
    values = [
        *VALUES,
        *drawn(300),
        1,
        1.5,
        1e-05,
        -3,
        True,
        False,
        None,
        [],
        ["a b", 1],
        {"path": "é.jsonl"},
        [{"a": ["x,y", None]}],
    ]
    commands = typed("\n".join(f"lockstep run {override('policy.path', value)}" for value in values), tmp_path)
    for value, (_, _, argument) in zip(values, commands, strict=True):
        (found,) = read([argument])
        assert found.key_or_group == "policy.path" and not found.is_sweep_override()
        assert OmegaConf.to_container(OmegaConf.create({"it": found.value()}), resolve=True)["it"] == value, argument


def test_it_is_quoted_no_more_than_needed_and_in_the_quotes_that_read_best():
    printed = [override("a.b", value) for value in ("x/y-1.z", 0.1, None, "<|pad|>", ["a b"], "$x", "it's")]
    assert printed == [
        "a.b=x/y-1.z", "a.b=0.1", "a.b=null", """a.b="'<|pad|>'\"""", """a.b="['a b']\"""",
        shlex.join(["a.b='$x'"]).replace("'a.b=", "a.b='", 1), """a.b=''"'"'it\\'"'"'s'"'"''""",
    ]  # fmt: skip
    assert [shell(word) for word in ("a b", "it's", "runs/x")] == ["'a b'", '"it\'s"', "runs/x"]


# ------------------------------------------------------------------------------------------------------ what is typed wrong

UNREADABLE = {
    "policy.path=epoch=3-step=100": """policy.path="'epoch=3-step=100'\"""",
    "policy.path=café/m": """policy.path="'café/m'\"""",
    "policy.tokenizer.pad_token=<|pad|>": """policy.tokenizer.pad_token="'<|pad|>'\"""",
    "policy.tokenizer.eos_token=</s>": """policy.tokenizer.eos_token="'</s>'\"""",
    "policy.tokenizer.chat_template={{ messages }}": """policy.tokenizer.chat_template="'{{ messages }}'\"""",
    "reward_model.url=http://h/s?a=1&b=2": """reward_model.url="'http://h/s?a=1&b=2'\"""",
    "policy.path=a(b)": """policy.path="'a(b)'\"""",
    "policy.path=#1": """policy.path="'#1'\"""",
    "+policy.path='a": """+policy.path=''"'"'\\'"'"'a'"'"''""",
}


@pytest.mark.parametrize("given", UNREADABLE)
def test_text_that_hydra_cannot_read_is_printed_with_the_quotes_that_it_needs(given, tmp_path):
    with pytest.raises(ConfigError) as error:
        compose([given])
    told = f"Hydra cannot read {given}: such text needs quotes, and these need the shell's. Type: {UNREADABLE[given]}"
    assert str(error.value) == told
    ((_, _, argument),) = typed(f"lockstep run {UNREADABLE[given]}", tmp_path)
    (found,) = read([argument])
    assert OmegaConf.create({"it": found.value()}).it == given.partition("=")[2]


def test_other_slips_of_the_keyboard_are_told_apart(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    say = lambda *given: pytest.raises(ConfigError, compose, given).value.args[0]  # noqa: E731
    assert say("policy.path=~/m") == (
        "Hydra cannot read policy.path=~/m, and no shell expands the ~ there. Type: policy.path=/home/me/m"
    )
    assert say("seed=1", "data.comparisons=[{path:", "hh.jsonl.gz}]") == (
        "The shell cut data.comparisons=[{path: hh.jsonl.gz}] apart at its spaces. Type: 'data.comparisons=[{path: hh.jsonl.gz}]'"
    )
    assert say("data.comparisons=[{path: é.jsonl}]") == (
        "Hydra cannot read data.comparisons=[{path: é.jsonl}] (token recognition error at: 'é'). In lists and groups too, text "
        "with unusual characters needs quotes: data.comparisons=\"[{path: 'my file.jsonl'}]\""
    )
    assert say("algorithm.kl_coef=0.1,0.2") == (
        "algorithm.kl_coef=0.1,0.2 gives several values, and only a sweep takes them: add -m. For a list, type: "
        "'algorithm.kl_coef=[0.1,0.2]'. For the text, type: algorithm.kl_coef=\"'0.1,0.2'\""
    )
    assert say("experiment=demo seed=1 ~stages.ppo") == (
        "experiment=demo seed=1 ~stages.ppo is several overrides in one. In a shell leave out the quotes around them; in Python "
        "write 'experiment=demo', 'seed=1', '~stages.ppo'."
    )
    for odd in ("polic", "", "=5", "+x", "a b=1"):
        assert say(odd) == f"{odd!r} is not an override. Write key=value, +key=value to add a key, or ~key to remove one."
    assert say(f"seed={'1' * 5000}").startswith(f"Hydra cannot read seed={'1' * 195}...: Exceeds the limit (4300 digits)")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"^lockstep run has no option --dryrun. Did you mean '--dry-run'\? It has -m, --multirun"
    ):
        run(None, ["--dryrun", "seed=1"])


def test_commands_that_are_printed_quote_their_folders(tmp_path):
    told = checkpoint.not_whole("runs of mine/ü")
    assert "lockstep merge 'runs of mine/ü' OUTPUT" in told
    assert told.endswith("""stages.ppo.policy="'runs of mine/ü'\".""")


# ---------------------------------------------------------------------------------------------------- what pages and code show

PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/speed/README.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
RECIPES = sorted({*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "plugins").rglob("*.yaml")})
CODE = sorted({*(ROOT / "framework").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")})
PLUGINS = ("median", "reinforce", "polite", "cut", "strict", "numpy", "mine", "...")
"""Names that pages choose and that are not installed here."""


def check(command: list[str], monkeypatch) -> None:
    """The command line reads it, and its overrides, of a sweep the first values, make an experiment unless some are left out."""
    name, *words = (word for word in command if word not in ("...", "[overrides]"))
    if name == "override":
        read(words)
        return
    monkeypatch.setattr(sys, "argv", ["lockstep", *words])
    try:
        arguments, rest = cli._parse()
    except SystemExit:
        pytest.fail(f"lockstep {shlex.join(words)}")
    overrides = [word for word in rest if not word.startswith("-")]
    found = [_first(each) or "" for each in read(overrides) if not each.key_or_group.startswith(("hydra", "torch.", "jax."))]
    unknown = "..." in command or any(each.partition("=")[2] in PLUGINS for each in found)
    if overrides and not unknown and not arguments.command.__name__.endswith("check"):
        experiment(tuple(found))


@functools.cache
def experiment(overrides: tuple[str, ...]) -> Experiment:
    return Experiment(compose(overrides))


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_can_be_typed(page, tmp_path, monkeypatch):
    for command in typed(shell_listings(page), tmp_path):
        check(command, monkeypatch)


@pytest.mark.parametrize("file", [file for file in RECIPES if shell_comments(file)], ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_what_a_recipe_shows_can_be_typed(file, tmp_path, monkeypatch):
    for command in typed(shell_comments(file), tmp_path):
        check(command, monkeypatch)


def test_overrides_in_errors_and_docstrings_can_be_typed(tmp_path):
    shown = [line for file in CODE for text in literals(file) for line in overrides_in(text).splitlines()]
    assert len(shown) > 30
    read([override for _, override in typed("\n".join(shown), tmp_path)])


def test_the_pages_and_recipes_show_as_much_as_they_did():
    """So that a listing that is no longer recognised is missed."""
    count = lambda text: sum("lockstep" in line for line in text.splitlines())  # noqa: E731
    assert count(shell_listings("README.md")) >= 15 and sum(count(shell_listings(page)) for page in PAGES) >= 80
    assert sum(bool(shell_comments(Path(file))) for file in RECIPES) >= 8
