"""Texts by path, pinned by the SHA-256 of their bytes, and refused with a reason when they are others.

    sources.py   path, pattern, list or URL -> bytes, in order, decompressed; the digest over all
    formats.py   bytes -> documents: a text is one, JSONL has one a line, Parquet one a row

Documents are `joined` by `data.join` into one text, as llama.cpp would see them in one file, or kept `apart`:
then each is tokenized by itself and no window reaches over the end of one. Whatever of this can change a
score is in `Text.measure`, and only where it does: documents joined, of equal weight and valid UTF-8 add
nothing to the measure of a plain text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.formats import Documents, documents_of
from pipeline.settings import DataSettings, PathsSettings, shown
from pipeline.sources import Source, digest_of, read_sources

WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
_SHAPES = {
    WIKITEXT2_SHA256: (1_290_590, 4_358, 1_467)
}  # bytes, lines, blank lines of files often met in altered copies


@dataclass(frozen=True)
class Text:
    """One text, or several documents kept apart.

    Attributes:
        text: the documents joined; empty when they are kept apart.
        sha256: of the sources' bytes (pipeline/sources.py), before any newline is taken off.
        source: path, for a person.
        document_starts: of joined documents, offsets in bytes of the text's UTF-8; the first is 0.
        documents: kept apart, in order; () when joined.
        weights: one for each of `documents`, or () when all weigh the same.
        n_replaced: characters U+FFFD that stand for bytes which are no UTF-8.
    """

    text: str
    sha256: str
    source: str
    document_starts: tuple[int, ...] = (0,)
    documents: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    n_replaced: int = 0

    @property
    def measure(self) -> dict[str, str]:
        """What the data add to the measure: their digest, and each policy that changed something."""
        found = {"data_sha256": self.sha256}
        if len(self.documents) > 1:
            found["data_documents"] = "apart"
        if self.weights:
            found["data_weights_sha256"] = hashlib.sha256(np.array(self.weights, "<f8").tobytes()).hexdigest()
        if self.n_replaced:
            found["data_errors"] = "replace"
        return found

    @property
    def remarks(self) -> list[str]:
        """What was done to the data that a person should know."""
        if not self.n_replaced:
            return []
        return [
            f"{self.source}: {self.n_replaced:,} characters U+FFFD stand for bytes that are not UTF-8 "
            "(data.errors=replace)"
        ]


def load_text(settings: DataSettings, cache: Path | None = None, cache_limit: int | None = None) -> Text:
    """Read, check and decode the data set that `data.*` names.

    Args:
        settings: `documents` null is joined here; `PerplexitySettings.resolved` has asked the protocol.
        cache: where URLs are fetched to; None is the default `paths.cache`.
        cache_limit: bytes that all that was fetched may take, None for no limit.

    Raises:
        DataError: missing, unreadable or empty source; other bytes than `data.sha256` says; invalid UTF-8; a
            row that is broken or lacks the field; no document with a word in it.
    """
    sources = read_sources(settings, cache or Path(PathsSettings().cache).expanduser(), cache_limit)
    settings = replace(settings, path=shown(settings.path))
    digest = digest_of(sources)
    if settings.sha256 is not None and digest != settings.sha256.lower():
        raise _mismatch(settings.path, sources, settings.sha256.lower(), digest)
    found = Documents()
    for source in sources:
        part = documents_of(source, settings)
        found.texts += part.texts
        found.weights += part.weights
        found.n_replaced += part.n_replaced
    if not any(text.strip() for text in found.texts):
        raise DataError(
            f"{settings.path}: none of its {len(found.texts):,} documents has a word in it",
            "data.path must name a text with words in it; data.field its column or key",
        )
    if settings.documents == "apart":
        return Text(
            "",
            digest,
            settings.path,
            documents=tuple(found.texts),
            weights=tuple(found.weights),
            n_replaced=found.n_replaced,
        )
    return Text(
        settings.join.join(found.texts),
        digest,
        settings.path,
        _starts(found.texts, settings.join),
        n_replaced=found.n_replaced,
    )


def _starts(documents: list[str], join: str) -> tuple[int, ...]:
    starts, position = [], 0
    for document in documents:
        starts.append(position)
        position += len(document.encode()) + len(join.encode())
    return tuple(starts)


def _mismatch(path: str, sources: Sequence[Source], expected: str, actual: str) -> DataError:
    """Another digest: try what usually happens to such files and say what was found."""
    kept = [str(source.kept) for source in sources if source.kept is not None]
    hint = "other bytes give other perplexities: get the original file, or drop data.sha256 to score this one"
    if kept:
        hint += f"; fetched before as {', '.join(kept)}: remove that to fetch it again"
    if len(sources) > 1:
        return DataError(
            f"{path}: SHA-256 of {len(sources)} files is {actual}, expected {expected}: "
            "another file, or another order",
            hint,
        )
    raw = sources[0].raw
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
        hint,
    )


def _against_shape(raw: bytes, n_bytes: int, n_lines: int, n_blank: int) -> list[str]:
    lines = raw.replace(b"\r\n", b"\n").split(b"\n")[: raw.count(b"\n")]
    found = sum(not line.strip() for line in lines)
    if found < n_blank and len(lines) - found == n_lines - n_blank:
        return [f"{n_blank - found:,} blank lines are stripped ({found:,} of {n_blank:,} are left)"]
    if found == n_blank and len(lines) == n_lines and len(raw) < n_bytes:
        return ["it has all its lines, but the spaces at their ends are stripped"]
    return [f"it has {len(raw):,} bytes and {len(lines):,} lines, expected {n_bytes:,} and {n_lines:,}"]
