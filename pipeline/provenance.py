"""What a number is of, and what made it: keys (contract.md 1), digests, versions.

    measure   data, token stream, protocol with all its settings         -> measure_key: what was asked
    subject   model, adapters, KV type, activation type, NUMERICS        -> subject_key: who was asked
    run_key   both; rows are merged only within one

A key is the first 16 hex digits of the SHA-256 of canonical JSON. Versions, host, CPU and threads are
recorded beside the numbers and are in no key: they do not change a bit.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_RECORDED = ("numpy", "numba", "llvmlite", "pyarrow", "tokenizers", "ray", "hydra-core", "mlflow")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII, no NaN: equal values make equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_of(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def run_key(measure: Mapping[str, Any], subject: Mapping[str, Any]) -> str:
    """The key under which rows may be merged."""
    return key_of([dict(measure), dict(subject)])


def subject_of(model_sha256: str, kv: str, activations: str) -> dict[str, Any]:
    """What is asked: the file's bytes and everything in the engine that can change a bit of its scores."""
    import engine

    return {
        "model_sha256": model_sha256,
        "adapters": "",
        "kv_type": kv,
        "activation_type": activations,
        "numerics": engine.NUMERICS,
    }


def file_sha256(path: Path, cache: Path) -> str:
    """SHA-256 of a file's bytes, computed once per (path, size, mtime, inode) and kept in `cache/digests`.

    A cache that cannot be written only costs the time to read the file again.

    Raises:
        OSError: the file cannot be read.
    """
    identity, kept = _kept_in(path, cache)
    if (known := _kept(identity, kept)) is not None:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    temporary = kept.with_name(f".{kept.name}.{uuid.uuid4().hex}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(canonical_json({"identity": identity, "sha256": digest}))
        temporary.replace(kept)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return digest


def model_sha256(path: Path, cache: Path) -> str:
    """SHA-256 of a model, as `file_sha256` keeps it: of the file's bytes.

    Of a split model, whose first part `path` is: SHA-256 over its parts' digests, each 64 hex digits and a
    newline, in order; `sha256sum NAME-*-of-*.gguf | cut -c -64 | sha256sum` prints it. It depends on neither
    the parts' names nor their folder, and only a part that changed is read again.

    Raises:
        EngineError: it is no GGUF model, or parts are missing or not of one model.
        OSError: a file cannot be read.
    """
    import engine

    with engine.open(path) as file:
        return files_sha256([Path(part) for part in file.paths], cache)


def files_sha256(parts: Sequence[Path], cache: Path) -> str:
    """What `model_sha256` says of a model of those files, whether they are one or not.

    Raises:
        OSError: a file cannot be read.
    """
    return _of_parts([file_sha256(part, cache) for part in parts])


def kept_sha256(parts: Sequence[Path], cache: Path) -> str | None:
    """What `model_sha256` says of a model of those files if that needs no reading of them, None otherwise.

    Raises:
        OSError: a file is not there.
    """
    digests = [_kept(*_kept_in(part, cache)) for part in parts]
    known = [digest for digest in digests if digest is not None]
    return _of_parts(known) if len(known) == len(digests) else None


def _of_parts(digests: Sequence[str]) -> str:
    """The one digest, or that of the digests."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def _kept_in(path: Path, cache: Path) -> tuple[list[str | int], Path]:
    """What tells a file from all others, and where its digest is kept."""
    status = path.stat()
    identity: list[str | int] = [str(path), status.st_size, status.st_mtime_ns, status.st_ino]
    return identity, cache / "digests" / f"{key_of(identity)}.json"


def _kept(identity: list[str | int], kept: Path) -> str | None:
    """The digest that was kept of that very file."""
    try:
        record = json.loads(kept.read_text())
        return str(record["sha256"]) if record["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def version() -> str:
    """Version of the installed distribution."""
    try:
        return importlib.metadata.version("pagemill")
    except importlib.metadata.PackageNotFoundError:
        return "0+uninstalled"


def versions() -> dict[str, str]:
    """Versions of what can matter to speed or bits, where installed."""
    found = {"pagemill": version(), "python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's name as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_sha() -> str | None:
    """Commit of the checkout the package runs from, `+dirty` when files differ.

    Where that was shipped without its history, what PAGEMILL_GIT_SHA says; None otherwise.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("PAGEMILL_GIT_SHA") or None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()
