"""Immutable files in hive folders (contract.md 3): how one is published, and which shards are finished.

    <results>/v1/table=windows/run_key=<16 hex>/plan.json       written at the first start, then only read
                                               /shard-<first window>.parquet
                /table=runs/run_key=<16 hex>/run-<UTC time>.parquet
                /table=throughput/run_key=<16 hex>/run-<UTC time>.parquet
                /table=tokens/run_key=<16 hex>/plan.json, shard-<first window>.parquet
                /table=comparisons/run_key=<16 hex>/run-<UTC time>.parquet, report.html
                /table=regressions/run_key=<16 hex>/run-<UTC time>.parquet, run-<UTC time>/: its jobs' results

A file is written under a name that begins with a dot, flushed to the disk, and linked to its own name:
whoever links first wins, the other's copy is dropped, and what is published never changes. So a finished
shard IS its file, there are no markers, and resuming is listing a folder. Listing opens each file: one that
is broken is moved aside (to a dot name, so that the shard can be published again) and reported; one that does
not belong is reported and left alone.

In an object store (`paths.results=s3://BUCKET/PREFIX`, pipeline/folders.py) the same names are objects, and a
conditional put stands for the link. `unpublished` is for workers that cannot write there: their tables travel
to the driver, which publishes them by the same rules.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageFailure, StoreError
from pipeline.folders import ObjectPath, at_once, check_store, folder_of, is_remote
from pipeline.provenance import canonical_json
from pipeline.shards import Shard, first_window_of
from pipeline.tables import SCHEMA_VERSION, WINDOWS_SCHEMA

T = TypeVar("T")
U = TypeVar("U")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEAST_FREE_BYTES = 16 << 20
_META = b"pagemill.shard"


@dataclass(frozen=True)
class Finished:
    """What a run's folder holds: the finished shards' files, and messages about files that are none."""

    paths: dict[Shard, Path]
    remarks: list[str]


@dataclass(frozen=True)
class ShardTable:
    """A table that runs leave in shards.

    Attributes:
        holds: whether the rows of a shard's file, whose columns it has to know, are those of its windows.
    """

    name: str
    holds: Callable[[pa.Table, Shard], bool]

    def folder(self, results: Path, run_key: str) -> Path:
        """Folder of a run's shards."""
        return results / f"v{SCHEMA_VERSION}" / f"table={self.name}" / f"run_key={run_key}"


def _has_its_windows(table: pa.Table, shard: Shard) -> bool:
    return bool(table.column("window").to_pylist() == list(range(shard.first_window, shard.end)))


WINDOWS = ShardTable("windows", _has_its_windows)
"""The usual one; another table may have rows by window too."""


def windows_folder(results: Path, run_key: str) -> Path:
    """Folder of a run's shards."""
    return WINDOWS.folder(results, run_key)


def runs_folder(results: Path, run_key: str) -> Path:
    """Folder of the rows that tell of a run's invocations."""
    return results / f"v{SCHEMA_VERSION}" / "table=runs" / f"run_key={run_key}"


def throughput_folder(results: Path, run_key: str) -> Path:
    """Folder of a benchmark's rows."""
    return results / f"v{SCHEMA_VERSION}" / "table=throughput" / f"run_key={run_key}"


def tokens_folder(results: Path, pair_key: str) -> Path:
    """Folder of the shards of a pair, a base and one variant."""
    return results / f"v{SCHEMA_VERSION}" / "table=tokens" / f"run_key={pair_key}"


def comparison_folder(results: Path, run_key: str) -> Path:
    """Folder of a comparison's rows and its report."""
    return results / f"v{SCHEMA_VERSION}" / "table=comparisons" / f"run_key={run_key}"


def regressions_folder(results: Path, run_key: str) -> Path:
    """Folder of a suite's runs: their records, and a folder of results for each."""
    return results / f"v{SCHEMA_VERSION}" / "table=regressions" / f"run_key={run_key}"


def probe(folder: Path, key: str) -> None:
    """Create the folder and publish a file in it as a shard would be, then remove it.

    Args:
        folder: where files will be published.
        key: the setting that names it, for the message.

    Raises:
        StoreError: it cannot be created or written, has no hard links, or is all but full; of an object
            store, see `folders.check_store`.
    """
    name = folder / f".probe.{uuid.uuid4().hex}"
    if isinstance(folder, ObjectPath):
        check_store(folder, key, name.name)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        publish(name, lambda file: file.write(b"probe"))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StoreError(
            f"{key}: cannot write to {folder}: {error.strerror}",
            f"give a folder that can be written as {key}",
        ) from error
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)
    if free < _LEAST_FREE_BYTES:
        raise StoreError(
            f"{key}: {folder} has {free:,} bytes free, expected {_LEAST_FREE_BYTES:,}", "make room there"
        )


def publish(final: Path, write: Callable[[BinaryIO], object]) -> bool:
    """Write a file and link it to its name; False when that name was taken first, which is fine.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    if isinstance(final, ObjectPath):
        held = io.BytesIO()
        write(held)
        return final.put(held.getvalue()) is not None
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, final)
    except FileExistsError:
        return False
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _sync_folder(final.parent)
    return True


def commit(table: pa.Table, final: Path, meta: Mapping[str, Any]) -> bool:
    """Publish a table as zstd Parquet with `meta` in its schema; False when the name was taken first.

    Raises:
        StorageFailure: the disk is full, or the file cannot be written for another reason.
    """
    tagged = table.replace_schema_metadata(
        {**(table.schema.metadata or {}), _META: canonical_json(dict(meta))}
    )
    try:
        return publish(final, lambda file: pq.write_table(tagged, file, compression="zstd"))
    except OSError as error:
        full = error.errno in _FULL
        raise StorageFailure(
            f"{final}: "
            + ("no space left on the device" if full else f"cannot be written: {error.strerror or error}"),
            ("make room" if full else "repair it")
            + " and run the same command again: finished shards are kept",
        ) from error


@dataclass(frozen=True)
class Unpublished:
    """A table for the driver to publish: its file's path, what the file says of itself, Arrow's stream."""

    path: str
    meta: Mapping[str, Any]
    rows: bytes

    def commit(self) -> bool:
        """See `commit`."""
        with pa.ipc.open_stream(self.rows) as reader:
            return commit(reader.read_all(), folder_of(self.path), self.meta)


def unpublished(table: pa.Table, path: str, meta: Mapping[str, Any]) -> Unpublished:
    """A table that travels; `commit` makes the same file of it, to the byte."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Unpublished(path, dict(meta), sink.getvalue().to_pybytes())


def fix_plan(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Write `plan.json` unless the run has one, and return the one that holds.

    Raises:
        StoreError: the plan there is broken or is another run's.
        StorageFailure: it cannot be written.
    """
    text = json.dumps(dict(wanted), indent=2, sort_keys=True, allow_nan=False) + "\n"
    try:
        publish(folder / "plan.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise StorageFailure(
            f"{folder / 'plan.json'}: cannot be written: {error.strerror}", "make room there"
        ) from error
    found = read_plan(folder, wanted)
    assert found is not None, "published a moment ago"
    return found


def read_plan(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run's plan, None before its first start; it must agree with `wanted` in `run_key` and `n_windows`.

    Raises:
        StoreError: the plan is broken or is another run's.
    """
    path = folder / "plan.json"
    try:
        found = json.loads(path.read_text())
        per_shard = found["windows_per_shard"]
        agrees = all(found[name] == wanted[name] for name in ("run_key", "n_windows"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a plan ({type(error).__name__}: {error})", _move(folder)) from error
    if not agrees or not isinstance(per_shard, int) or per_shard < 1:
        raise StoreError(
            f"{path}: is the plan of another run or was edited, expected {wanted['run_key']}", _move(folder)
        )
    return dict(found)


def finished_shards(
    folder: Path, shards: Sequence[Shard], run_key: str, table: ShardTable = WINDOWS
) -> Finished:
    """Open every file of a run's folder and say which shards are finished.

    Raises:
        StoreError: the folder or a file in it cannot be read.
    """
    by_first = {shard.first_window: shard for shard in shards}
    paths: dict[Shard, Path] = {}
    remarks: list[str] = []
    try:
        is_there = is_remote(folder) or folder.exists()
        names = sorted(path.name for path in folder.iterdir()) if is_there else []
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be listed: {error.strerror}", "check the folder's permissions"
        ) from error
    named = {}
    for name in names:
        if name.startswith(".") or name == "plan.json":
            continue
        first = first_window_of(name)
        shard = None if first is None else by_first.get(first)
        if shard is None:
            remarks.append(f"{folder / name}: not a file of this run; left alone and not counted")
        else:
            named[name] = shard

    def fault_of(item: tuple[str, Shard]) -> str | None:
        return _fault(folder / item[0], item[1], run_key, table)

    for (name, shard), fault in zip(named.items(), _each(folder, fault_of, named.items()), strict=True):
        if fault:
            aside = folder / f".{name}.broken-{uuid.uuid4().hex[:8]}"
            (folder / name).rename(aside)
            remarks.append(f"{folder / name}: {fault}; moved to {aside.name} and not counted")
        else:
            paths[shard] = folder / name
    return Finished(paths, remarks)


def read_windows(
    paths: Mapping[Shard, Path], schema: pa.Schema = WINDOWS_SCHEMA, columns: Sequence[str] | None = None
) -> pa.Table:
    """The rows of finished shards in window order.

    Args:
        schema: of their table.
        columns: None for all.

    Raises:
        StorageFailure: a file cannot be read back.
    """
    try:
        names = list(schema.names if columns is None else columns)
        chosen = None if columns is None else names

        def read(path: Path) -> pa.Table:
            return pq.read_table(readable(path), columns=chosen, partitioning=None)

        files = [paths[shard] for shard in sorted(paths)]
        tables = list(_each(files[0], read, files)) if files else []
        # The empty table brings columns that were added since a file was written; they are null there.
        empty = schema.empty_table().select(names)
        return pa.concat_tables([empty, *tables], promote_options="default").select(names)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StorageFailure(
            f"a finished shard cannot be read back: {error}", "run the same command again"
        ) from error


def readable(path: Path) -> Path | pa.BufferReader:
    """What Arrow reads a file from: its path, or an object's bytes.

    Raises:
        OSError: of an object, when it cannot be read.
    """
    return pa.BufferReader(path.read_bytes()) if is_remote(path) else path


def _each(where: Path, what: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`map`, several at once where each has to wait for a store's answer."""
    return at_once(what, items) if is_remote(where) else map(what, items)


def shard_meta(shard: Shard, run_key: str) -> dict[str, Any]:
    """What a shard's file says of itself."""
    return {"run_key": run_key, "first_window": shard.first_window, "n_windows": shard.n_windows}


def _fault(path: Path, shard: Shard, run_key: str, of: ShardTable) -> str | None:
    """Why a file with a shard's name is not that shard, None when it is."""
    try:
        table = pq.read_table(readable(path), partitioning=None)
        meta = json.loads((table.schema.metadata or {}).get(_META, b"null"))
        is_whole = of.holds(table, shard)
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        return f"is broken ({str(error).splitlines()[0]})"
    except OSError as error:
        if error.errno is None:  # Arrow's own complaint about the content
            return f"is broken ({str(error).splitlines()[0]})"
        raise StoreError(
            f"{path}: cannot be read: {error.strerror}", "check the disk and the permissions"
        ) from error
    if meta != shard_meta(shard, run_key):
        return "is another run's or another plan's"
    if not is_whole:
        return "has other windows than its name says"
    return None


def _move(folder: Path) -> str:
    return f"move {folder} away and run again; every shard is then computed anew"


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot flush a folder; the file itself is flushed
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
