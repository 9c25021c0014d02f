"""``lockstep new-plugin NAME``: a plugin package to edit. As written, it installs, runs and passes the conformance kit.

``templates/common`` and ``templates/<kind>`` hold its files, with ``NAME`` in their paths and ``{{name}}``, ``{{Class}}`` and
``{{distribution}}`` in their text. Their names end in ``.template``, so that Python tools ignore them.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path

from lockstep.checking.conformance.kit import KINDS
from lockstep.errors import ConfigError, did_you_mean
from lockstep.registry import registry
from lockstep.reporting.console import Console

TEMPLATES = Path(__file__).parent / "templates"
SUFFIX = ".template"
MANIFESTS = {"policy": ("torch", "jax")}
"""Manifests of kinds that have one per backend, instead of a single ``plugin``."""


def new_plugin(name: str, kind: str, where: Path) -> Path:
    """Write ``where/lockstep-<name>`` and print what to type next. Returns the folder.

    Raises:
      ConfigError: the name cannot be used, or the folder exists; nothing is written.
    """
    _check(name, kind)
    folder = where / f"lockstep-{name.replace('_', '-')}"
    if folder.exists():
        raise ConfigError(f"{folder} already exists and was not changed. Choose another name, or move the folder away.")
    for path, text in package(name, kind).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    console = Console()
    console.say(f"{folder}: the {kind} '{name}', ready to run. To install, test and check it:\n")
    console.say(f"  cd {folder.name}\n  pip install -e .\n  python -m pytest\n  lockstep check {name} --kind {kind}\n")
    console.say(f"Then read README.md: it says what to edit in lockstep_{name}/, and how to run an experiment with it.")
    return folder


def package(name: str, kind: str) -> dict[str, str]:
    """{path: text} of the package's files."""
    words = {
        "{{entry_points}}": "\n".join(
            f'{name if manifest == "plugin" else f"{name}_{manifest}"} = "lockstep_{name}:{manifest}"'
            for manifest in MANIFESTS.get(kind, ("plugin",))
        ),
        "{{distribution}}": f"lockstep-{name.replace('_', '-')}",
        "{{Class}}": class_name(name),
        "{{name}}": name,
    }
    files = {}
    for folder in (TEMPLATES / "common", TEMPLATES / kind):
        for template in sorted(folder.rglob(f"*{SUFFIX}")):
            path = template.relative_to(folder).as_posix().removesuffix(SUFFIX).replace("NAME", name)
            files[path] = _filled(template.read_text(encoding="utf-8"), words)
    return files


def class_name(name: str) -> str:
    """'best_of_n' -> 'BestOfN'."""
    return "".join(word[:1].upper() + word[1:] for word in name.split("_"))


def _filled(text: str, words: dict[str, str]) -> str:
    for placeholder, word in words.items():
        text = text.replace(placeholder, word)
    return text


def _check(name: str, kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"There is no template of kind '{kind}'.{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}.")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        simple = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_0123456789")
        hint = f" Try: lockstep new-plugin {simple} --kind {kind}" if simple and not keyword.iskeyword(simple) else ""
        raise ConfigError(f"'{name}' cannot be the name of a module. Use small letters, digits and single underscores.{hint}")
    if owners := {c.distribution for c in registry() if (c.kind, c.name) == (kind, name)}:
        raise ConfigError(f"The {kind} '{name}' exists, from {' and '.join(sorted(owners))}. Choose another name.")
    if importlib.util.find_spec(f"lockstep_{name}"):
        raise ConfigError(f"A module lockstep_{name} is already installed. Choose another name than '{name}'.")
    taken = "\n".join(file.read_text(encoding="utf-8") for file in (TEMPLATES / kind).rglob(f"*.py{SUFFIX}"))
    if re.search(rf"\b{class_name(name)}\b", taken):
        raise ConfigError(f"The class of '{name}' would be {class_name(name)}, which means something else. Choose another name.")
