"""Files of the driver's cache on nodes whose cache is another one: the token streams that workers map.

`paths.cache` is one path and, unless a file system is shared, a folder of each node's own. Every node is
asked before work starts which of a run's files it has with the driver's content (`lacking`, within
`topology.look`); what it lacks it is sent through Ray's object store, and writes beside its other streams
(`lay`). pipeline/survey.py does the asking and the sending.
"""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StoreError

if TYPE_CHECKING:
    from pipeline.tokens import TokenStream


@dataclass(frozen=True)
class CacheFile:
    """A file of the driver's cache, of the same path on every node."""

    path: str
    n_bytes: int
    sha256: str


def files_of(streams: Iterable[TokenStream], cache: Path) -> tuple[CacheFile, ...]:
    """The files of token streams, each once; their digests are kept.

    Raises:
        StoreError: a file cannot be read.
    """
    from pipeline.provenance import file_sha256

    paths = dict.fromkeys(path for stream in streams for path in stream.paths)
    try:
        return tuple(CacheFile(str(path), path.stat().st_size, file_sha256(path, cache)) for path in paths)
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}", "check paths.cache") from error


def lacking(files: Sequence[CacheFile], cache: Path) -> tuple[str, ...]:
    """Paths of the files that are not here, or have another content."""
    from pipeline.provenance import file_sha256

    def is_here(file: CacheFile) -> bool:
        path = Path(file.path)
        try:
            return path.stat().st_size == file.n_bytes and file_sha256(path, cache) == file.sha256
        except OSError:
            return False

    return tuple(file.path for file in files if not is_here(file))


def content(file: CacheFile) -> Any:
    """(n,) uint8, the file's bytes as a map of them."""
    import numpy as np

    return np.asarray(np.memmap(file.path, np.uint8, "r"))


def lay(files: Sequence[CacheFile], *contents: Any) -> None:
    """Write files here; each gets its name when it is whole, so that two may do this at once.

    Args:
        contents: (n,) uint8 of each.

    Raises:
        StoreError: the folder cannot be written, or something else arrived; names this host.
    """
    host = socket.gethostname()
    for file, data in zip(files, contents, strict=True):
        path = Path(file.path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        if (found := hashlib.sha256(data).hexdigest()) != file.sha256:
            raise StoreError(
                f"{path}: what arrived on {host} has SHA-256 {found}, expected {file.sha256}",
                "did the file change while it was sent? run the command again",
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as written:
                written.write(data)
                written.flush()
                os.fsync(written.fileno())
            temporary.replace(path)
        except OSError as error:
            raise StoreError(
                f"{path.parent} on {host}: cannot keep the token stream: {error.strerror or error}",
                "paths.cache has to be a folder that every node can write, or one that they share",
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
