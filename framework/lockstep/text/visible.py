"""Make untrusted text safe to show: it cannot steer a terminal, reorder a line, or hide part of itself."""

from __future__ import annotations

import re

# The C0 and C1 controls except line feed and tab; line and paragraph separators; marks, embeddings, overrides and isolates of
# bidirectional text; zero-width characters; tags; halves of surrogate pairs. Not the zero-width joiners U+200C and U+200D:
# Persian, the scripts of India and emoji need them, and they do not move text.
_UNSAFE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\U000e0000-\\U000e007f\\ud800-\\udfff]"
)


def visible(text: str) -> str:
    r"""Spell out the characters of ``text`` that a reader would not see but a terminal would obey: ESC becomes \x1b. Line feeds
    and tabs stay, as do escapes that are already spelled out."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))
