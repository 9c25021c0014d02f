"""The listings of a page: Python, run one after the other as a reader would, and what is typed into a shell."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def python_listings(page: str, heading: str | None = None) -> str:
    """All of a page, or of one of its sections."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading is not None:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def run_listings(source: str) -> dict[str, Any]:
    """The names that they leave behind."""
    names: dict[str, Any] = {"__name__": "listing"}
    exec(compile(source, "listing", "exec"), names)
    return names


# --------------------------------------------------------------------------------------------------------------- shell

_KEY = r"[+~]?[a-z_]\w*(?:[./]\w+)+"
OVERRIDE = re.compile(rf"""'{_KEY}=[^']*'|(?<![\w./{{?&'-]){_KEY}=(?:"[^"]*"|'[^']*'|[^\s,;'"`)]+)""")
"""An override in prose: its key has a dot or a slash. It may be quoted as a whole, or its value."""


def shell_listings(page: str) -> str:
    """What a page of Markdown shows to be typed, as a script: commands of Lockstep and overrides, in blocks indented by four
    spaces and in backquotes."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks = "".join(re.findall(r"(?m)^(?: {4}.*\n)+", text)).replace("\\\n", "")
    code = [line.strip() for line in blocks.splitlines()]
    code += [inline for inline in re.findall(r"`([^`\n]+)`", text) if not re.fullmatch(r"lockstep [\w-]+", inline)]
    return _script(line for line in code if re.match(_COMMAND, line) or OVERRIDE.match(line))


def shell_comments(file: Path) -> str:
    """The same of the comments of a YAML file, where lines of commands begin with ``lockstep`` or ``...``."""
    text = "\n".join(re.findall(r"(?m)#[ ]*(.*)$", file.read_text(encoding="utf-8"))).replace("\\\n", "")
    lines = [re.sub(r"^\.\.\. ", "override ", line) for line in text.splitlines()]
    return _script(found for line in lines for found in ([line] if re.match(_COMMAND, line) else OVERRIDE.findall(line)))


def overrides_in(text: str) -> str:
    """The overrides of a text, as a script."""
    return _script(found.rstrip(".:") for found in OVERRIDE.findall(text))


_COMMAND = r"(\.venv/bin/)?lockstep\s|override |echo .* \| lockstep "


def _script(lines: Iterable[str]) -> str:
    return "\n".join(line if re.match(_COMMAND, line) else f"override {line.rstrip('.')}" for line in lines)


def literals(file: Path) -> Iterable[str]:
    """The texts of a Python file, with 1 in place of what is filled in; docstrings too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "1" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


OTHERS = "pip python wandb make cd tensorboard"


def typed(script: str, folder: Path) -> list[list[str]]:
    """What each command of a script becomes when bash runs it: 'lockstep' or 'override', and its arguments."""
    stubs = "".join(f"{name}() {{ :; }}; " for name in (*OTHERS.split(), "command_not_found_handle"))
    record = "printf '%s\\0' \"$FUNCNAME\" \"$@\" $'\\1' >&3"
    stubs += f'lockstep() {{ {record}; }}; override() {{ {record}; }}; function .venv/bin/lockstep {{ lockstep "$@"; }}; '
    ran = subprocess.run(["bash", "-c", f"exec 3>log; {stubs}\n{script}"], cwd=folder, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
    words = (folder / "log").read_text(encoding="utf-8").split("\0")[:-1]
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "\1":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands[:-1]
