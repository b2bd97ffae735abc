"""Where compiled kernels are kept between processes, and whether a file's are there. Does not import Numba.

Numba's own cache does not notice an edit in another file (a helper, a constant), so the directory is named by
a digest of all sources that hold kernels and of the compiler's versions. The CPU's name and features are part
of Numba's index key, so one directory serves unlike machines. The path of the installation is not part of the
key: the same sources at another path (a fresh clone, a Ray upload) find the same machine code.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from engine.machine import cpu_features, cpu_name

if TYPE_CHECKING:
    from engine.gguf import GGUFFile

ENGINE = Path(__file__).resolve().parent
_SOURCES = ("kernels", "quants")  # the folders whose files hold jitted functions

log = logging.getLogger(__name__)


@functools.cache
def sources_digest() -> str:
    """First 16 hex digits of SHA-256 over every kernel source and the compiler's versions."""
    digest = hashlib.sha256(f"numba {version('numba')} llvmlite {version('llvmlite')}".encode())
    for folder in _SOURCES:
        for path in sorted((ENGINE / folder).rglob("*.py")):
            digest.update(path.relative_to(ENGINE).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def cache_dir() -> Path | None:
    """Directory of the compiled kernels (`NUMBA_CACHE_DIR` moves it), or None where it cannot be written."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagemill" / "kernels"
    path = Path(os.environ.get("NUMBA_CACHE_DIR") or default) / sources_digest()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        log.warning("compiled kernels cannot be kept in %s (%s): set NUMBA_CACHE_DIR", path, error)
        return None
    return path


def is_warm(file: GGUFFile) -> bool:
    """Whether `engine.warm_up` of a file of that architecture and those tensor types has finished here.

    On a CPU like this one.
    """
    marker = _marker(file)
    return marker is not None and marker.exists()


def mark_warm(file: GGUFFile) -> None:
    """Remembers that every kernel that the file needs is on disk."""
    marker = _marker(file)
    if marker is not None:
        marker.touch()


def _marker(file: GGUFFile) -> Path | None:
    types = sorted({tensor.type.name for tensor in file.tensors.values()})
    name = str(file.metadata.get("general.architecture"))
    key = "\n".join([cpu_name(), *sorted(cpu_features()), name, *types])
    folder = cache_dir()
    return folder and folder / f"warm-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
