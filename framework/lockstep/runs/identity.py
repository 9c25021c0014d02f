"""Stage identities: hashes of content, code and folders, and the differences between two of them.

Equal hashes mean equal results, so a stored stage can be reused. Of the core's code, only what decides a result counts. The
folders in `NOT_RESULTS` don't count: they only show, check or start results, or predict their cost.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from lockstep.config.schema import differences
from lockstep.errors import ConfigError
from lockstep.registry import use_current_folder
from lockstep.storage.files import checksum

CORE = "lockstep"
NOT_RESULTS = frozenset({"reporting", "planning", "checking", "commands", "api"})


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of ``content``: equal for equal content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def decisive_backend(group: Mapping[str, Any]) -> dict[str, Any]:
    """The backend's group without its mesh: the number of devices changes results by rounding only."""
    return {key: value for key, value in group.items() if key != "mesh"}


def without_server(engine: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An engine's group without ``server``, which says where it is: at another address it draws the same."""
    return None if engine is None else {key: value for key, value in engine.items() if key != "server"}


def code_digests(modules: Iterable[str]) -> dict[str, str]:
    """{package: SHA-256 of its source} for the core, the top-level packages of these modules, and what they import from the
    folder that they are in, if they are not installed. Nothing is imported.

    Raises:
      ConfigError: the source of a package has changed since this process imported it.
    """
    digests: dict[str, str] = {}
    to_do = {CORE} | {module.partition(".")[0] for module in modules}
    while to_do:
        package = min(to_do)
        if (spec := _found(package)) is not None:
            roots = [Path(root) for root in spec.submodule_search_locations or []] or [Path(spec.origin)]
            digests[package], imported = _source(package, roots)
            to_do |= {name for name in imported if any(_is_beside(root, name) for root in roots)} - digests.keys()
            here = getattr(sys.modules.get(package), "__file__", None)
            runs = here is not None and any(Path(here).is_relative_to(root) for root in roots)
            if runs and _imported.setdefault(package, digests[package]) != digests[package]:
                raise ConfigError(
                    f"The code of '{package}' has changed since this process began: what it still runs would be kept as the work "
                    "of the new code. Start Python again (in a notebook: restart the kernel) and run this again."
                )
        to_do.remove(package)
    return dict(sorted(digests.items()))


_imported: dict[str, str] = {}
"""{package: its digest when first computed}, for packages that this process has imported."""


def _found(package: str) -> ModuleSpec | None:
    """The spec of a package; None for Python's own. A package that is not installed may be in the current folder."""
    if package in sys.stdlib_module_names:
        return None
    if (spec := importlib.util.find_spec(package)) is None:
        use_current_folder()
        spec = importlib.util.find_spec(package)
    return spec


def _source(package: str, roots: Iterable[Path]) -> tuple[str, set[str]]:
    """The SHA-256 of a package's source, and the names of the packages that it may import."""
    source, imported = hashlib.sha256(), set()
    for root in roots:
        for file in [root] if root.is_file() else sorted(root.rglob("*.py")):
            inside = file.relative_to(root).parts if file != root else ()
            if package != CORE or inside[0] not in NOT_RESULTS:
                text = file.read_bytes()
                source.update(f"{'/'.join(inside)}\0".encode() + text)
                imported |= {name.decode() for match in _IMPORT.finditer(text) for name in _NAME.findall(match[1] or match[2])}
    return source.hexdigest(), imported


_IMPORT = re.compile(rb"^[ \t]*(?:import[ \t]+([^\n;#]+)|from[ \t]+(\w+))", re.MULTILINE)
_NAME = re.compile(rb"(?:^|,)[ \t]*(\w+)")


def _is_beside(root: Path, name: str) -> bool:
    """True if the folder of a package has another of this name, and is not where packages are installed."""
    folder = root.parent
    beside = any(file.is_file() for file in (folder / f"{name}.py", folder / name / "__init__.py"))
    return beside and not {"site-packages", "dist-packages"} & set(folder.parts)


def folder_digest(path: str) -> str:
    """SHA-256 of the names and contents of a folder's files, or of one file. Cached until a file's size, times or inode
    change."""
    files = sorted(p for p in [Path(path), *Path(path).rglob("*")] if p.is_file())
    stats = [file.stat() for file in files]
    return _content_digest(path, tuple(files), tuple((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in stats))


@functools.lru_cache(maxsize=256)
def _content_digest(path: str, files: tuple[Path, ...], stats: tuple[tuple[int, ...], ...]) -> str:
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.relative_to(path)}\0{checksum(file)}".encode())
    return content.hexdigest()


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between a stored stage and the present one. Changed inputs are listed only if nothing else differs."""
    changes = without_copies(differences(before, now))
    return [
        f"the code of {change.partition(':')[0].removeprefix('code.')}" if change.startswith("code.") else change
        for change in changes
        if not change.startswith("inputs.") or all(c.startswith("inputs.") for c in changes)
    ]


def without_copies(changes: list[str]) -> list[str]:
    """Drop changes of a stage's group that repeat changes of the group it was copied from."""
    leaf = lambda change: change.partition(": ")[0].rpartition(".")[2] + change.partition(": ")[2]  # noqa: E731
    own = {leaf(change) for change in changes if not change.startswith("stages.")}
    return [change for change in changes if not change.startswith("stages.") or leaf(change) not in own]
