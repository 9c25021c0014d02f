"""Escapes foreign text for Markdown, so that it stays plain text on one line."""

from __future__ import annotations

import re

from lockstep.config.secrets import redact
from lockstep.text.visible import visible

# Characters that would start code, emphasis, a cell, a link or its target, a tag or autolink, or an entity. Brackets alone and
# underscores inside words are left: intervals and names of metrics have them.
_MARKUP = re.compile(r"[\\`*|~]|(?<=\])[(\[:]|!(?=\[)|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")
_BLOCK = re.compile(r"[#>]|[-+=](?:[-=\s]|$)")
"""The beginning of a heading, a quotation, a list or a rule."""
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def escaped(text: str) -> str:
    """Return ``text`` escaped for use as a table cell, a list item or a paragraph."""
    line = " ".join(visible(redact(text)).split())
    line = _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), line)
    return f"\\{line}" if _BLOCK.match(line) else line
