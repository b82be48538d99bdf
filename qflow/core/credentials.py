"""Passwords and tokens in addresses: they are hidden in every line, error, configuration and page."""

from __future__ import annotations

import re

HIDDEN = "***"
_USER = re.compile(r"(?<=://)([^\s/?#'\"@:]*)(:?)[^\s/?#'\"]*@")
_NAMES = "passw(?:or)?d|pwd|token|secret|api_?key|signature"
_QUERY = re.compile(rf"([?&;](?:[\w.-]*(?:{_NAMES}))=)[^\s&#;'\"]+", re.IGNORECASE)


def masked(text: str) -> str:
    """Return `text` with the password, or the token in place of a user, of each address replaced by `***`.

    Query parameters whose names end in password, passwd, pwd, token, secret, api_key or signature are hidden too.
    """
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(_without_password, text))


def _without_password(found: re.Match[str]) -> str:
    user, colon = found.groups()
    return f"{user}:{HIDDEN}@" if colon else f"{HIDDEN}@"
