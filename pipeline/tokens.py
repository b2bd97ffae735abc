"""A text's token stream: made once by the driver, cached, checked by its SHA-256, mapped by every worker.

Three files per stream in `paths.cache/tokens`, all .npy:

    <key>.tokens.npy   (n,)   int32   the ids of one call on the whole text, BOS first if the model adds one;
                                      documents kept apart are tokenized by themselves, one after the other
    <key>.counts.npy   (3, n) int32   of each token: bytes of its piece; words that begin in it; its document
    <key>.pieces.npy   (p,)   PIECE   what was tokenized in one call: the text, or each document kept apart,
                                      one without tokens as well

The key covers the text, its documents and weights, the tokenizer's digest and the sources of the engine, so a
corrected tokenizer never meets an old stream.

A word begins at a character that is not white space and whose predecessor in the stream's text is white space
or nothing. It is counted in the token that holds the first byte of that character. So the words of
consecutive tokens add up, and over a whole piece they are `len(text.split())`. The bytes of a piece's tokens
add up to those of its text: a space that a tokenizer puts in front of every text is not counted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.datasets import Text
from pipeline.errors import StoreError
from pipeline.provenance import canonical_json

if TYPE_CHECKING:
    import engine
    from pipeline.windows import Window

Ids = npt.NDArray[np.int32]
log = logging.getLogger(__name__)
_WHITE_SPACE = np.array([chr(point).isspace() for point in range(0x3002)])  # by code point; none is above


PIECE = np.dtype([("first", "<i8"), ("n_special", "<i8"), ("n_blank_ends", "<i8"), ("weight", "<f8")])
"""Place of its first token; tokens that are not of its text (a BOS); of its text's two ends, how many are
white space; weight, NaN when all weigh the same."""


@dataclass(frozen=True)
class TokenStream:
    """A cached stream: `tokens` (n,), `counts` (3, n) int32 and `pieces` are read-only maps of its files."""

    tokens_path: Path
    counts_path: Path
    sha256: str
    tokens: Ids
    counts: Ids
    pieces: npt.NDArray[np.void]

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """Of its files; the tokens last, with which a stream is there."""
        return self.counts_path, _pieces_path(self.tokens_path), self.tokens_path

    def counted(self, window: Window) -> dict[str, int | float | None]:
        """What the stream knows of a window, as columns of its row.

        `document` is of its first token; `weight` is None when all weigh the same.
        """
        n_bytes, n_words, _ = self.counts[:, window.scored].sum(axis=1, dtype=np.int64).tolist()
        document = int(self.counts[2, window.first_token])
        piece = self.pieces[document if self.is_apart else 0]
        weight = float(piece["weight"])
        return {
            "document": document,
            "weight": None if np.isnan(weight) else weight,
            "n_bytes": n_bytes,
            "n_words": n_words + (int(piece["n_blank_ends"]) if window.counts_blank_ends else 0),
        }

    @property
    def borders(self) -> npt.NDArray[np.int64]:
        """(p + 1,) places of the pieces' first tokens, and the stream's end."""
        return np.append(self.pieces["first"], self.tokens.size)

    @property
    def is_apart(self) -> bool:
        """Whether there are several documents, tokenized one by one."""
        return bool(self.pieces.size > 1)

    @property
    def n_documents(self) -> int:
        """Documents, joined or apart."""
        return int(self.pieces.size if self.is_apart else self.counts[2].max(initial=0) + 1)

    @property
    def n_short(self) -> int:
        """Pieces whose text has fewer than two tokens."""
        return int(np.count_nonzero(np.diff(self.borders) - self.pieces["n_special"] < 2))


def tokens_sha256(tokens: Ids) -> str:
    """SHA-256 of the ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").data).hexdigest()


def open_stream(tokens_path: Path, counts_path: Path) -> TokenStream:
    """Map a stream's files; the third lies beside them.

    Raises:
        OSError, ValueError: a file is missing, cut short or not the array it should be.
    """
    tokens, counts = np.load(tokens_path, mmap_mode="r"), np.load(counts_path, mmap_mode="r")
    pieces = np.load(_pieces_path(tokens_path), mmap_mode="r")
    if (
        tokens.dtype != np.int32
        or tokens.ndim != 1
        or counts.dtype != np.int32
        or counts.shape != (3, tokens.size)
        or pieces.dtype != PIECE
        or pieces.size < 1
    ):
        raise ValueError(f"{tokens_path}: not a token stream")
    return TokenStream(tokens_path, counts_path, tokens_sha256(tokens), tokens, counts, pieces)


def token_stream(text: Text, tokenizer: engine.Tokenizer, cache: Path) -> TokenStream:
    """The stream of a text under a tokenizer, from the cache when it is there.

    Raises:
        StoreError: the cache folder cannot be written.
    """
    parts: list[Any] = [
        hashlib.sha256(text.text.encode()).hexdigest(),
        hashlib.sha256(repr(text.document_starts).encode()).hexdigest(),
        tokenizer.sha256,
        _tokenizer_code(tokenizer),
    ]
    if text.documents:
        parts += ["apart", list(text.weights)]
        parts += [hashlib.sha256(document.encode()).hexdigest() for document in text.documents]
    return _kept(parts, cache, lambda: _tokenize(text, tokenizer))


def stream_of_ids(ids: Ids, tokenizer: engine.Tokenizer, cache: Path) -> TokenStream:
    """The stream of a text of which its ids, (n,) int32, are all that is known.

    Raises:
        StoreError: the cache folder cannot be written.
    """

    def make() -> tuple[Ids, Ids, npt.NDArray[np.void]]:
        pieces = np.zeros(1, PIECE)
        pieces["n_special"] = int(tokenizer.add_bos and ids[0] == tokenizer.bos_id)
        pieces["weight"] = np.nan
        text = tokenizer.decode(ids)
        pieces["n_blank_ends"] = text[:1].isspace() + text[-1:].isspace()
        return ids, count(ids, tokenizer), pieces

    return _kept(["ids", tokens_sha256(ids), tokenizer.sha256, _tokenizer_code(tokenizer)], cache, make)


def _kept(
    parts: list[Any], cache: Path, make: Callable[[], tuple[Ids, Ids, npt.NDArray[np.void]]]
) -> TokenStream:
    """The stream with that key's parts from the cache, where it is put when it is not there."""
    key = hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]
    tokens_path, counts_path = cache / "tokens" / f"{key}.tokens.npy", cache / "tokens" / f"{key}.counts.npy"
    try:
        return open_stream(tokens_path, counts_path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used (%s): tokenizing again", tokens_path, error)
    tokens, counts, pieces = make()
    try:
        _write(counts_path, counts)
        _write(_pieces_path(tokens_path), pieces)
        _write(tokens_path, tokens)  # last: a stream is there when its tokens are
    except OSError as error:
        raise StoreError(
            f"{tokens_path.parent}: cannot write the token cache: {error.strerror}",
            "give another folder as paths.cache",
        ) from error
    return open_stream(tokens_path, counts_path)


def _tokenize(text: Text, tokenizer: engine.Tokenizer) -> tuple[Ids, Ids, npt.NDArray[np.void]]:
    """Tokens, counts and pieces: one call a piece."""
    texts = text.documents or (text.text,)
    streams, counts = [], []
    pieces = np.zeros(len(texts), PIECE)
    pieces["n_special"] = int(tokenizer.add_bos)
    pieces["weight"] = text.weights or np.nan
    place = 0
    for number, piece in enumerate(texts):
        ids = np.ascontiguousarray(tokenizer.encode(piece), np.int32)
        counted = count(ids, tokenizer, text.document_starts, piece.encode())
        counted[2] += number
        pieces["first"][number] = place
        pieces["n_blank_ends"][number] = piece[:1].isspace() + piece[-1:].isspace()
        place += ids.size
        streams.append(ids)
        counts.append(counted)
    return np.concatenate(streams), np.concatenate(counts, axis=1), pieces


def count(
    tokens: Ids,
    tokenizer: engine.Tokenizer,
    document_starts: tuple[int, ...] = (0,),
    raw: bytes | None = None,
) -> Ids:
    """(3, n) int32: bytes, words begun and document of each token, as the head of this file defines them.

    `raw` is the text that was tokenized, which tells a space that the tokenizer put in front from one of the
    text's own.
    """
    n_bytes = np.asarray(tokenizer.byte_lengths, np.int32)[tokens]
    ends = np.cumsum(n_bytes, dtype=np.int64)
    decoded = tokenizer.decode(tokens)
    text = decoded.decode("utf-8", "surrogateescape")  # a stray byte becomes one character
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    stray = (points >= 0xDC80) & (points <= 0xDCFF)
    width = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    width[stray] = 1
    blank = _WHITE_SPACE[np.minimum(points, _WHITE_SPACE.size - 1)]
    begins = ~blank & np.concatenate(([True], blank[:-1]))
    at_byte = (np.cumsum(width) - width)[begins]
    words = np.bincount(np.searchsorted(ends, at_byte, side="right"), minlength=tokens.size)
    put_in_front = int(raw is not None and decoded == b" " + raw)
    begun = np.maximum(ends - n_bytes - put_in_front, 0)
    document = np.searchsorted(np.array(document_starts, np.int64), begun, side="right") - 1
    if put_in_front:
        n_bytes[np.flatnonzero(n_bytes)[0]] -= 1
    return np.stack([n_bytes, words, document]).astype(np.int32)


def _tokenizer_code(tokenizer: engine.Tokenizer) -> str:
    """Digest of the modules beside the tokenizer's, and the version of the library below it."""
    home = Path(inspect.getfile(type(tokenizer))).parent
    digest = hashlib.sha256(importlib.metadata.version("tokenizers").encode())
    for source in sorted(home.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _pieces_path(tokens_path: Path) -> Path:
    return tokens_path.with_name(tokens_path.name.replace(".tokens.npy", ".pieces.npy"))


def _write(path: Path, array: npt.NDArray[Any]) -> None:
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
