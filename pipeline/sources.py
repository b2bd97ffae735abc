"""`data.path` or `data.files` -> files in a defined order, as bytes, decompressed.

    one path      a file, a URL, or `python:MODULE`
    a pattern     with `*`, `?` or `[`, unless a file of that very name is there; `**` goes into folders.
                  Files in the order of their paths' code points
    data.files    in the order given

gzip and Zstandard are told by their first bytes; a name ending in .gz or .zst whose bytes say otherwise is
refused. The digest of a file is that of its bytes as they come out of the decompression, so a compressed copy
is the same data. The digest of several files is that of their digests:

    sha256sum FILES | cut -c1-64 | sha256sum
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import fetch
from pipeline.errors import DataError
from pipeline.node_cache import local_copy
from pipeline.settings import PYTHON_SOURCE, DataSettings, is_url, shown

_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


@dataclass(frozen=True)
class Source:
    """One file: `name` as given but for secrets, its bytes out of any compression, where a fetched one is."""

    name: str
    raw: bytes
    kept: Path | None = None


def read_sources(settings: DataSettings, cache: Path, cache_limit: int | None = None) -> list[Source]:
    """All files of a data set, at least one; URLs are fetched into `cache`.

    Args:
        cache_limit: bytes that all that was fetched may take, None for no limit.

    Raises:
        DataError: missing, unreadable or empty file; a pattern that matches nothing; broken compression.
        StoreError: the cache cannot be written, or has no room.
    """
    names = settings.files or [settings.path]
    return [_read(name, cache, cache_limit) for given in names for name in _expanded(given)]


def digest_of(sources: Sequence[Source]) -> str:
    """SHA-256 of the one file's bytes, or of the lines of digests of several."""
    digests = [hashlib.sha256(source.raw).hexdigest() for source in sources]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def _expanded(path: str) -> list[str]:
    """The files a pattern matches, or the path itself."""
    if path.startswith(PYTHON_SOURCE):
        return [path]
    if is_url(path):  # `?` and `[` have other meanings there
        return fetch.matches(path) if "*" in path and not path.startswith(("http:", "https:")) else [path]
    if not glob.has_magic(path) or Path(path).exists():
        return [path]
    found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        raise DataError(f"{path}: matches no file", "check the pattern, or name the files by data.files")
    return found


def _read(name: str, cache: Path, cache_limit: int | None) -> Source:
    kept = None
    if name.startswith(PYTHON_SOURCE):
        raw = _packaged_text(name)
    elif is_url(name):
        with local_copy(name, None, cache, cache_limit) as copy:
            kept, name = copy.path, shown(name)
            raw = _bytes_of(str(kept))
    else:
        raw = _bytes_of(name)
    if not raw.strip():
        size = "is empty" if not raw else f"holds nothing but {len(raw):,} bytes of white space"
        raise DataError(f"{name}: the data {size}", "data.path must name a text with words in it")
    return Source(name, _decompressed(name, raw), kept)


def _bytes_of(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file", "set data.path to a text file, or choose a data set by data=NAME"
        ) from None
    except IsADirectoryError:
        raise DataError(
            f"{path}: is a folder, expected a text file",
            "give the file inside it as data.path, or several as 'FOLDER/*.txt'",
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


def _decompressed(name: str, raw: bytes) -> bytes:
    kind = next((kind for kind, magic in _MAGIC.items() if raw.startswith(magic)), None)
    promised = _SUFFIXES.get(Path(name.split("::")[0].split("?")[0]).suffix.lower())
    if promised is not None and kind != promised:
        raise DataError(
            f"{name}: begins with 0x{raw[:4].hex()}, which is no {promised}, though its name says so",
            "is it another file, or was it decompressed already? rename it then",
        )
    if kind is None:
        return raw
    try:
        text = gzip.decompress(raw) if kind == "gzip" else _zstd(raw)
    except (EOFError, OSError, zlib.error) as error:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        fault = "ends in the middle of its compressed data" if cut else f"is broken: {error}"
        raise DataError(
            f"{name}: {kind}, {len(raw):,} bytes, {fault}", "is the file complete? get it again"
        ) from error
    if not text.strip():
        raise DataError(f"{name}: the data is empty once decompressed", "check how it was compressed")
    return text


def _zstd(raw: bytes) -> bytes:
    """All frames; Arrow brings the codec."""
    import pyarrow as pa

    with pa.input_stream(pa.BufferReader(raw), compression="zstd") as stream:
        return bytes(stream.read())
