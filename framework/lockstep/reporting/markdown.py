"""Text that is not ours in Markdown: it stays text, in one line."""

from __future__ import annotations

import re

from lockstep.config.secrets import redact
from lockstep.text.visible import visible

# What would start code, emphasis, a cell, a link or its target, a tag or autolink, an entity. Brackets and underscores alone are
# left: intervals and names of metrics have them.
_MARKUP = re.compile(r"[\\`*|~]|(?<=\])[(\[:]|!(?=\[)|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")
_BLOCK = re.compile(r"[#>]|[-+=](?:[-=\s]|$)")
"""The beginning of a heading, a quotation, a list or a rule."""
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def escaped(text: str) -> str:
    """``text`` as a cell of a table, an item of a list or a paragraph."""
    line = " ".join(visible(redact(text)).split())
    line = _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), line)
    return f"\\{line}" if _BLOCK.match(line) else line
