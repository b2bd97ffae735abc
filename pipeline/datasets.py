"""Texts by path, pinned by the SHA-256 of their bytes, and refused with a reason when they are others.

A plain text is taken as llama.cpp takes it (protocol.md 2.1): its bytes as they are, less exactly one newline
at the very end. A JSONL file holds one document a line; the documents are joined by `data.join` into one
text.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.settings import PYTHON_SOURCE, DataSettings

WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
_SHAPES = {
    WIKITEXT2_SHA256: (1_290_590, 4_358, 1_467)
}  # bytes, lines, blank lines of files often met in altered copies


@dataclass(frozen=True)
class Text:
    """One text: documents in order, and where each begins.

    `sha256` is of the source's bytes (the file, or the UTF-8 of a packaged text), before any newline is taken
    off. `document_starts` are offsets in bytes of the text's UTF-8, the first is 0.
    """

    text: str
    sha256: str
    source: str
    document_starts: tuple[int, ...] = (0,)


def load_text(settings: DataSettings) -> Text:
    """Read, check and decode the data set that `data.*` names.

    Raises:
        DataError: missing, unreadable or empty source; other bytes than `data.sha256` says; invalid UTF-8; a
        JSONL
            line that is broken or lacks the field.
    """
    raw = _packaged_text(settings.path) if settings.path.startswith(PYTHON_SOURCE) else _read(settings.path)
    if not raw.strip():
        size = "is empty" if not raw else f"holds nothing but {len(raw):,} bytes of white space"
        raise DataError(f"{settings.path}: the data {size}", "data.path must name a text with words in it")
    digest = hashlib.sha256(raw).hexdigest()
    if settings.sha256 is not None and digest != settings.sha256.lower():
        raise _mismatch(settings.path, raw, settings.sha256.lower(), digest)
    text = _decode(settings.path, raw)
    if settings.format == "jsonl":
        documents = _jsonl_documents(settings.path, text, settings.field)
        return Text(settings.join.join(documents), digest, settings.path, _starts(documents, settings.join))
    return Text(text.removesuffix("\n"), digest, settings.path)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file", "set data.path to a text file, or choose a data set by data=NAME"
        ) from None
    except IsADirectoryError:
        raise DataError(
            f"{path}: is a folder, expected a text file", "give the file inside it as data.path"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}", "check the file's permissions"
        ) from error


def _packaged_text(path: str) -> bytes:
    """`python:A.B` -> the mapping `B` of module `A.B`: its texts in key order, blank lines between, UTF-8."""
    module = path.removeprefix(PYTHON_SOURCE)
    try:
        texts = getattr(importlib.import_module(module), module.rpartition(".")[2], None)
    except (ImportError, ValueError):
        texts = None
    if not isinstance(texts, Mapping) or not all(isinstance(text, str) for text in texts.values()):
        raise DataError(
            f"{path}: this Python has no module {module!r} with a mapping of texts under its own last name",
            f"expected for example data.path={PYTHON_SOURCE}pydoc_data.topics, or a file",
        )
    return "\n".join(texts[key] for key in sorted(texts)).encode()


def _decode(path: str, raw: bytes) -> str:
    """UTF-8 with nothing translated: a CRLF stays a CRLF."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            hint = "it begins like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
        else:
            hint = "convert it, for example: iconv -f LATIN1 -t UTF-8 FILE > NEW"
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise DataError(
            f"{path}: byte {error.start:,} (line {line:,}) is 0x{byte:02x}, not UTF-8: {error.reason}",
            hint,
        ) from None


def _jsonl_documents(path: str, text: str, field: str) -> list[str]:
    documents: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number:,}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{where} is not JSON: {error}", "data.format=jsonl wants one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{where} is a JSON {type(record).__name__}, expected an object", "see data.format"
            )
        if not isinstance(record.get(field), str):
            found = (
                "is no string"
                if field in record
                else f"is missing; it has {', '.join(map(repr, record)) or 'none'}"
            )
            raise DataError(f"{where}: field {field!r} {found}", "name the text's field by data.field=NAME")
        try:
            record[field].encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: field {field!r} holds half of a surrogate pair", "it is no text; fix it"
            ) from None
        documents.append(record[field])
    return documents


def _starts(documents: list[str], join: str) -> tuple[int, ...]:
    starts, position = [], 0
    for document in documents:
        starts.append(position)
        position += len(document.encode()) + len(join.encode())
    return tuple(starts)


def _mismatch(path: str, raw: bytes, expected: str, actual: str) -> DataError:
    """Another digest: try what usually happens to such files and say what was found."""
    causes = []
    repairs = {
        "its line ends are CRLF; with LF line ends the digest is right": raw.replace(b"\r\n", b"\n"),
        "it begins with a byte order mark; without it the digest is right": raw.removeprefix(b"\xef\xbb\xbf"),
        "the newline at its end is missing; with it the digest is right": raw + b"\n",
        "it has one newline too many at its end": raw.removesuffix(b"\n"),
    }
    causes += [cause for cause, bytes_ in repairs.items() if hashlib.sha256(bytes_).hexdigest() == expected]
    if not causes:
        if n_crlf := raw.count(b"\r\n"):
            causes.append(f"it has {n_crlf:,} CRLF line ends")
        if expected in _SHAPES:
            causes += _against_shape(raw, *_SHAPES[expected])
    usual = "; ".join(causes) or "it is another text, another split or another version"
    return DataError(
        f"{path}: SHA-256 is {actual}, expected {expected}: {usual}",
        "other bytes give other perplexities: get the original file, or drop data.sha256 to score this one",
    )


def _against_shape(raw: bytes, n_bytes: int, n_lines: int, n_blank: int) -> list[str]:
    lines = raw.replace(b"\r\n", b"\n").split(b"\n")[: raw.count(b"\n")]
    found = sum(not line.strip() for line in lines)
    if found < n_blank and len(lines) - found == n_lines - n_blank:
        return [f"{n_blank - found:,} blank lines are stripped ({found:,} of {n_blank:,} are left)"]
    if found == n_blank and len(lines) == n_lines and len(raw) < n_bytes:
        return ["it has all its lines, but the spaces at their ends are stripped"]
    return [f"it has {len(raw):,} bytes and {len(lines):,} lines, expected {n_bytes:,} and {n_lines:,}"]
