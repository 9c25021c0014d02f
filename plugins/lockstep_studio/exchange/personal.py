"""Search for personal data in free text, so that a person can look at it before the text leaves.

Found are e-mail addresses, telephone numbers (international forms, and North American ones with separators), IBANs (ISO
13616: length by country, remainder 1 modulo 97), payment cards (ISO/IEC 7812: Luhn's check, issuers' prefixes, printed
groups), IP addresses except loopback, US social security numbers, text that looks like a street address (English, German, Dutch,
French, Italian, Spanish), and URLs that name a user. Not found are names of people, dates of birth, national forms of other
countries' telephone numbers and identity numbers, and bare digits without a form. One in ten random numbers of sixteen digits
passes Luhn's check.

The search takes time linear in the text: every pattern has a bounded length, and begins only where a token begins.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """``text[start:end]`` may be personal data of this kind."""

    kind: str
    start: int
    end: int


def find(text: str) -> list[Found]:
    """Findings in the order of the text, without overlaps. Of two that overlap, the first to begin is kept; if both begin at the
    same place, the longer one."""
    found = sorted((each for search in _SEARCHES for each in search(text)), key=lambda each: (each.start, -each.end))
    kept: list[Found] = []
    for each in found:
        if not kept or each.start >= kept[-1].end:
            kept.append(each)
    return kept


def _matches(
    kind: str, pattern: re.Pattern[str], holds: Callable[[re.Match[str]], bool] | None = None
) -> Callable[[str], Iterator[Found]]:
    """A search for matches that satisfy ``holds``."""

    def search(text: str) -> Iterator[Found]:
        for match in pattern.finditer(text):
            if holds is None or holds(match):
                yield Found(kind, *match.span())

    return search


# ---------------------------------------------------------------------------------------------------------------- the net

_EMAIL = re.compile(r"(?<![\w.%+'-])[\w.%+'-]{1,64}@(?:[^\W_](?:[\w-]{0,62})\.){1,6}[^\W\d_]{2,24}(?![\w-])")

_USER_AT = re.compile(r"(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]{1,15}://[^\s/@:]{1,64}(?::[^\s/@]{0,64})?@[^\s/@]{1,255}")
_PROFILE = re.compile(
    r"(?<![\w.@-])(?:https?://)?(?:www\.|m\.)?(?:"
    r"(?:twitter|x|instagram|facebook|github|gitlab|tiktok|threads|pinterest|twitch|soundcloud)\.(?:com|net|tv)/@?"
    r"|(?:youtube|medium)\.com/@|linkedin\.com/in/|reddit\.com/u(?:ser)?/|t\.me/|keybase\.io/"
    r"|snapchat\.com/add/|[a-z0-9-]{2,30}\.social/@"
    r")[\w.-]{2,64}",
    re.IGNORECASE,
)

_ADDRESS_4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_ADDRESS_6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,39}(?:\.\d{1,3}){0,3}(?![\w:])")
_VERSION = re.compile(
    r"(?:\bv|\bver\.?|versions?|release|build|firmware|section|chapter|§|[$€£]|EUR|USD)[ :=]{0,2}$", re.IGNORECASE
)
"""Text before four numbers that shows that they are not an address."""


def _is_ip(match: re.Match[str]) -> bool:
    if not any(map(str.isdigit, match[0])):  # a::b is a name in C++
        return False
    before = match.string[max(0, match.start() - 12) : match.start()]
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.version == 4 and _VERSION.search(before))


_SSN = re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")

# ------------------------------------------------------------------------------------------------------------ telephones

_INTERNATIONAL = re.compile(r"(?<![\w+])(?:\+|00(?=[1-9]\d{0,2}[ ./-]))[1-9](?:[ ./()-]{0,3}\d){6,14}(?![\d-])")
_AMERICAN = re.compile(
    r"(?<![\w.,/+-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d([ .-]))[2-9]\d\d(?(1)\1|[ .-])\d{4}(?![\w/-]|[.,]\d)"
)

# ------------------------------------------------------------------------------------------------------ money: IBAN, cards

_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d\d(?=[ -]?[A-Za-z0-9])")
_LENGTHS = {
    country: int(length)
    for length, countries in {
        "15": "NO", "16": "BE", "18": "DK FI FO GL NL SD", "19": "MK SI", "20": "AT BA EE KZ LT LU MN XK", "21": "CH CR HR LI LV",
        "22": "BG BH DE GB GE IE ME RS VA", "23": "AE GI IL IQ OM SO TL", "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST", "26": "IS TR", "27": "BI DJ FR GR IT MC MR SM", "28": "AL AZ BY CY DO GT HU LB NI PL SV",
        "29": "BR EG PS QA UA", "30": "JO KW MU YE", "31": "MT SC", "32": "LC", "33": "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
"""Characters of an IBAN, by country (SWIFT's IBAN registry)."""


def _ibans(text: str) -> Iterator[Found]:
    for match in _IBAN.finditer(text):
        length, end = _LENGTHS.get(match[0][:2].upper(), 0), match.end()
        read = list(match[0])
        while len(read) < length and end < len(text):
            end += text[end] in " -" and end + 1 < len(text)
            if not (text[end].isascii() and text[end].isalnum()):
                break
            read.append(text[end])
            end += 1
        alone = end == len(text) or not text[end].isalnum()
        if len(read) == length and length and alone and _remainder("".join(read).upper()) == 1:
            yield Found("iban", match.start(), end)


def _remainder(iban: str) -> int:
    """The IBAN modulo 97, with its first four characters moved to the end and A = 10 ... Z = 35."""
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97


_CARD = re.compile(r"(?<![\w.,+-])[2-6]\d{3}(?:\d{9,15}|([ -])(?:\d{4}\1\d{4}\1\d{1,7}|\d{6}\1\d{4,5}))(?![\w-]|[.,]\d)")


def _is_card(match: re.Match[str]) -> bool:
    digits = [int(digit) for digit in match[0] if digit.isdigit()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    issuer = int("".join(map(str, digits[:4])))
    return (issuer >= 3000 or 2221 <= issuer <= 2720) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


# -------------------------------------------------------------------------------------------------------------- streets

_WORD = r"[A-ZÀ-Þ][\w'’-]{0,30}"
_ENGLISH = re.compile(
    rf"(?<![\w.,$€£-])\d{{1,5}}[A-Za-z]?,? (?:(?:[NSEW]\.?|\d{{1,3}}(?:st|nd|rd|th)|{_WORD}) ){{1,4}}"
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Terrace|Crescent|Close|Square|Highway|Hwy|Parkway"
    r"|Pkwy|Place|Pl|Way)\b\.?(?! [a-z]{2,} of\b)"
)
_GERMANIC = re.compile(
    r"(?<![\w-])[A-ZÄÖÜ][\w-]{1,40}(?:straße|strasse|str\.|weg|gasse|allee|platz|ring|damm|straat|laan|plein)"
    r"\.? \d{1,4} ?[a-z]?\b"
)
_FRENCH = re.compile(
    r"(?<![\w.,-])\d{1,4}(?: ?(?:bis|ter))?,? (?:rue|avenue|boulevard|bd|place|chemin|impasse|allée|quai|route) "
    r"(?:(?:de|du|des|la|le|les) |l['’]|d['’]){0,3}[A-ZÀ-Þ]\w{1,30}"
)
_LATIN = re.compile(
    r"(?<!\w)(?:[Vv]ia|[Vv]iale|[Pp]iazza|[Cc]orso|[Cc]alle|[Aa]venida|[Pp]laza|[Rr]ua) "
    r"(?:(?:de|del|della|di|la|las|los|da|do|dos) ){0,2}"
    rf"{_WORD}(?: {_WORD}){{0,3}},? (?:n\.? ?|nº ?)?\d{{1,4}}\b(?![.,]\d)"
)

_SEARCHES: tuple[Callable[[str], Iterator[Found]], ...] = (
    _matches("url", _USER_AT),
    _matches("url", _PROFILE),
    _matches("email", _EMAIL),
    _ibans,
    _matches("card", _CARD, _is_card),
    _matches("ssn", _SSN),
    _matches("ip", _ADDRESS_4, _is_ip),
    _matches("ip", _ADDRESS_6, _is_ip),
    _matches("phone", _INTERNATIONAL),
    _matches("phone", _AMERICAN),
    *(_matches("street", pattern) for pattern in (_ENGLISH, _GERMANIC, _FRENCH, _LATIN)),
)
