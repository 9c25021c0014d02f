"""Writes a script in jupytext's percent format as a notebook next to it, without outputs.

python docs/examples/notebook.py docs/examples/first_steps.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def notebook(script: str) -> dict[str, Any]:
    _, *parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)  # before the first cell is jupytext's header
    cells = []
    for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        markdown = kind.strip() == "[markdown]"
        source = (re.sub(r"^# ?", "", text, flags=re.MULTILINE) if markdown else text).strip().splitlines(keepends=True)
        cell = {"cell_type": "markdown" if markdown else "code", "id": f"cell-{number}", "metadata": {}, "source": source}
        cells.append(cell if markdown else {**cell, "execution_count": None, "outputs": []})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def written(script: str) -> str:
    return json.dumps(notebook(script), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.with_suffix(".ipynb").write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")
