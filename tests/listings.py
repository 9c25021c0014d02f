"""The Python listings of a page, run one after the other as a reader would."""

from __future__ import annotations

import re
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
