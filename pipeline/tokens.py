"""A text's token stream: made once by the driver, cached, checked by its SHA-256, mapped by every worker.

Two files per stream in `paths.cache/tokens`, both .npy:

    <key>.tokens.npy   (n,)   int32   the ids of one call on the whole text, BOS first when the model adds one
    <key>.counts.npy   (3, n) int32   of each token: bytes of its piece; words that begin in it; its document

The key covers the text, its documents, the tokenizer's digest and the sources of the engine, so a corrected
tokenizer never meets an old stream.

A word begins at a character that is not white space and whose predecessor in the stream's text is white space
or nothing. It is counted in the token that holds the first byte of that character. So the words of
consecutive tokens add up, and over the whole stream they are `len(text.split())`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import logging
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.datasets import Text
from pipeline.errors import StoreError
from pipeline.provenance import canonical_json

if TYPE_CHECKING:
    import engine

Ids = npt.NDArray[np.int32]
log = logging.getLogger(__name__)
_WHITE_SPACE = np.array(
    [point for point in range(0x3001) if chr(point).isspace()], np.uint32
)  # there are none above


@dataclass(frozen=True)
class TokenStream:
    """A cached stream: `tokens` (n,) int32 and `counts` (3, n) int32 are read-only maps of the two files."""

    tokens_path: Path
    counts_path: Path
    sha256: str
    tokens: Ids
    counts: Ids


def tokens_sha256(tokens: Ids) -> str:
    """SHA-256 of the ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").data).hexdigest()


def open_stream(tokens_path: Path, counts_path: Path) -> TokenStream:
    """Map a stream's two files.

    Raises:
        OSError, ValueError: a file is missing, cut short or not the array it should be.
    """
    tokens, counts = np.load(tokens_path, mmap_mode="r"), np.load(counts_path, mmap_mode="r")
    if (
        tokens.dtype != np.int32
        or tokens.ndim != 1
        or counts.dtype != np.int32
        or counts.shape != (3, tokens.size)
    ):
        raise ValueError(f"{tokens_path}: not a token stream")
    return TokenStream(tokens_path, counts_path, tokens_sha256(tokens), tokens, counts)


def token_stream(text: Text, tokenizer: engine.Tokenizer, cache: Path) -> TokenStream:
    """The stream of a text under a tokenizer, from the cache when it is there.

    Raises:
        StoreError: the cache folder cannot be written.
    """
    parts = [
        hashlib.sha256(text.text.encode()).hexdigest(),
        hashlib.sha256(repr(text.document_starts).encode()).hexdigest(),
        tokenizer.sha256,
        _tokenizer_code(tokenizer),
    ]
    key = hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]
    tokens_path, counts_path = cache / "tokens" / f"{key}.tokens.npy", cache / "tokens" / f"{key}.counts.npy"
    try:
        return open_stream(tokens_path, counts_path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used (%s): tokenizing again", tokens_path, error)
    tokens = np.ascontiguousarray(tokenizer.encode(text.text), np.int32)
    try:
        _write(counts_path, count(tokens, tokenizer, text.document_starts))
        _write(tokens_path, tokens)  # last: a stream is there when its tokens are
    except OSError as error:
        raise StoreError(
            f"{tokens_path.parent}: cannot write the token cache: {error.strerror}",
            "give another folder as paths.cache",
        ) from error
    return open_stream(tokens_path, counts_path)


def count(tokens: Ids, tokenizer: engine.Tokenizer, document_starts: tuple[int, ...] = (0,)) -> Ids:
    """(3, n) int32: bytes, words begun and document of each token, as the head of this file defines them."""
    n_bytes = np.asarray(tokenizer.byte_lengths, np.int32)[tokens]
    ends = np.cumsum(n_bytes, dtype=np.int64)
    text = tokenizer.decode(tokens).decode("utf-8", "surrogateescape")  # a stray byte becomes one character
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    stray = (points >= 0xDC80) & (points <= 0xDCFF)
    width = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    width[stray] = 1
    blank = np.isin(points, _WHITE_SPACE)
    begins = ~blank & np.concatenate(([True], blank[:-1]))
    at_byte = (np.cumsum(width) - width)[begins]
    words = np.bincount(np.searchsorted(ends, at_byte, side="right"), minlength=tokens.size)
    document = np.searchsorted(np.array(document_starts, np.int64), ends - n_bytes, side="right") - 1
    return np.stack([n_bytes, words, document]).astype(np.int32)


def _tokenizer_code(tokenizer: engine.Tokenizer) -> str:
    """Digest of the modules beside the tokenizer's, and the version of the library below it."""
    home = Path(inspect.getfile(type(tokenizer))).parent
    digest = hashlib.sha256(importlib.metadata.version("tokenizers").encode())
    for source in sorted(home.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _write(path: Path, array: Ids) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)  # a cache: the newest of equal files wins
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
