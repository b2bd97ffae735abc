"""Secrets that a URL may carry, left out of everything that is logged or kept.

A login (`https://NAME:PASSWORD@HOST/...`) and the values of a query (`?X-Amz-Signature=...`, `?token=...`)
become `***`. All values, not those of known names: a store calls its secret what it likes. Messages of ours
name a path by `settings.shown`; this is the net below them, for any text: a library's message, a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar, cast

HIDDEN = "***"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_LOGIN = re.compile(r"(?<=://)[^/\s?#]*@")
_QUERY = re.compile(r"(?<=[?&])([^=&#\s]+)=[^&#\s]*")

T = TypeVar("T")


def redacted(value: T) -> T:
    """The same text, or mapping or list of texts, without what the URLs in it should not tell."""
    if isinstance(value, str):
        return cast(T, _URL.sub(_of_url, value) if "://" in value else value)
    if isinstance(value, Mapping):
        return cast(T, {key: redacted(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return cast(T, type(value)(redacted(item) for item in value))
    return value


def _of_url(match: re.Match[str]) -> str:
    shown = _LOGIN.sub(f"{HIDDEN}@", match.group())
    return _QUERY.sub(rf"\1={HIDDEN}", shown)
