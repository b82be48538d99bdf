"""Passwords and tokens in addresses: they are hidden in every line, error, configuration and page.

What SQLAlchemy, requests and libpq take as one is hidden, even where its special characters are not written as %XX.
Where a text can be read in two ways, more is hidden: a password ends at the last @ of its address or line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus

HIDDEN = "***"
_ADDRESS = re.compile(r"\s*[\w+.-]+://")
_PIECES = re.compile(r"(?<=\n)|(?<![\w+.:/@-])(?=[\w+.-]+://)")
_PORT = re.compile(r"(?:\[[^\]\s/@]*\]|[^\s:/@]*):\d*(?=[/?#]|['\")\]}>.,;:]*(?:\s|$))")
_NO_PORT = re.compile(r"(?!\[)[^:/\s]*:(?!PORT\b)(?=[^\s/?#]*[^\W\d])([^\s/?#'\"]*)")
_PARAMETER = re.compile(r"[?&;]([\w.%+\[\]-]*)=([^&]*)")
_SECRET = re.compile("pass|pwd|token|secret|(?<!share)key|sig|auth|cred|jwt|bearer", re.IGNORECASE)
"""What the name of a parameter in an address contains whose value is hidden."""
_NAMES = (
    r"(?:(?<![a-z])(?:pass|pwd|auth)|passw(?:or)?d|passphrase|token|secret|credentials?|signature|"
    r"(?:api|access|account|private)[_-]?key)"
)
_QUOTED = r"'(?:[^'\\]|\\.)*'?|\"(?:[^\"\\]|\\.)*\"?"
_STATED = re.compile(
    rf"{_NAMES}(?:['\"]?\s*=(?!=)\s*|%(?:25)?3D)({_QUOTED}|(?:\\.|[^\s&])+)"  # password=x, also as %3D
    rf"|{_NAMES}['\"]\s*:\s*({_QUOTED})"  # of a mapping
    r"|\bbearer\s+([^\s'\"]{4,})|\bauthorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?([^\s'\"]+)",  # of a request
    re.IGNORECASE | re.DOTALL,
)
_DONE = re.compile(r"\*\*\*(?=[@&\s.,;:'\")]|$)")


def masked(text: str) -> str:
    """Return `text` with every password, token and signature in it replaced by `***`.

    These are the password of an address, a token in place of its user, parameters with a name such as password, token,
    secret, key, sig or auth, also in words such as `host=h password=x`, and what follows `Bearer`. A text that begins
    with an address is one as a whole.
    """
    if _ADDRESS.match(text):
        return _hidden(text, whole=True)
    return "".join(_hidden(piece, whole=False) for piece in _PIECES.split(text))


def masked_values(node: Any) -> Any:
    """Return plain containers in which every text is masked on its own, before it is quoted or broken into lines."""
    if isinstance(node, Mapping):
        return {key: masked_values(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [masked_values(value) for value in node]
    return masked(node) if isinstance(node, str) else node


def without_user(address: str) -> str:
    """Return an address without the name and password before its host."""
    for _, stop in _of_user(address, whole=True):
        if address[stop:].startswith("@"):
            return f"{address.partition('://')[0]}://{address[stop + 1 :]}"
    return address


def _hidden(text: str, whole: bool) -> str:
    """The text, which holds one address at most, without what is secret; a part of a line may be masked already."""
    parts, end = [], 0
    for start, stop in sorted([*_of_user(text, whole), *_of_parameters(text, whole), *_stated(text)]):
        if start >= end and not (_DONE.match(text, start) and not whole):
            parts += [text[end:start], HIDDEN]
            end = stop
        elif start < end:
            end = max(end, stop)
    return "".join([*parts, text[end:]])


def _of_user(text: str, whole: bool) -> Iterator[tuple[int, int]]:
    """The place of the password or token before the host, or of what stands where a port belongs."""
    scheme, mark, rest = text.partition("://")
    first = len(scheme) + len(mark)
    if not mark or (scheme.lower().endswith(("http", "https")) and _PORT.match(rest)):
        return
    user, last = re.match(r"([^:/]*):", rest), rest.rfind("@")
    if user and last >= user.end():
        yield first + (0 if "@" in user[1] else user.end()), first + last
    elif token := re.match(r"[^:/]*@" if whole else r"[^:/\s'\"]*@", rest):
        yield first, first + token.end() - 1
    elif odd := _NO_PORT.match(rest):
        yield first + odd.start(1), first + odd.end(1)


def _of_parameters(text: str, whole: bool) -> Iterator[tuple[int, int]]:
    """The places of values whose parameter has the name of a secret, or that state one themselves."""
    for found in _PARAMETER.finditer(text):
        name, value = (unquote_plus(part) for part in found.groups())
        if _SECRET.search(name) or _STATED.search(value):
            stop = found.end(2) if whole else found.start(2) + len(text[found.start(2) : found.end(2)].rstrip("\n"))
            yield found.start(2), stop


def _stated(text: str) -> Iterator[tuple[int, int]]:
    for found in _STATED.finditer(text):
        yield found.span(found.lastindex or 0)
