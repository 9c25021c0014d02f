"""Crash-safe files and folders: written under a temporary name, flushed, then renamed. After a kill or a power failure a
file or folder is complete or absent.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockstep.errors import CheckpointError, ConfigError


def write_json(path: Path, content: Any) -> None:
    write_text(path, dump(content))


def dump(content: Any) -> str:
    """``content`` as JSON, in which NaN and infinity are null."""
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return finite(content) if isinstance(content, float) else content


def replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise CheckpointError(
            f"Could not write {path}: {error}. {free / 1e6:.0f} MB are free there. Make room and run the same command "
            "again: it resumes from the last complete checkpoint."
        ) from error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(number)


def move_folder(temporary: Path, final: Path) -> None:
    """Flush a complete folder to the disk, then give it its final name. It replaces whatever had that name."""
    for path in [*sorted(temporary.rglob("*")), temporary]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync(final.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process killed mid-write left in ``folder``. No other process may be writing there."""
    for path in folder.glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def load_json(path: Path) -> Any:
    """
    Raises:
      OSError, ValueError: the file cannot be read, or is not JSON.
    """
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("it is empty")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    try:
        return load_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      CheckpointError: it cannot be read, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but begins {json.dumps(content)[:40]}.")
    return content


def write_text(path: Path, content: str) -> None:
    replace(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def dump_line(row: Any) -> str:
    """One line of JSONL; JSON has no NaN or infinity, so they become null."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def expanded(path: str | Path) -> Path:
    """The path with the home folder in place of '~'.

    Raises:
      ConfigError: there is no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{str(path)!r}: {error} Write the whole path, or set HOME.") from error


def finite(value: float | None) -> float | None:
    """The value for JSON, which has no NaN or infinity: they become None (null)."""
    return float(value) if value is not None and math.isfinite(value) else None


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
