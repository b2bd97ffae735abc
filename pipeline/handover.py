"""The state of a document, handed from a shard to the one that follows it by a file beside the shards.

    .state-<first window of the following shard, 8 digits>

Where workers do not see the shards' folder, or it is an object store, the files are in the node's own cache,
<paths.cache>/states/<run key>: a shard whose document another node began does not find them.

A shard that hands its state on saves it before it publishes its own file, so behind a finished shard there is
a state as long as the following shard is not finished. The state is written under a name of its own and
linked into place: the first writer wins, and since the same tokens give the same bits it does not matter
which. The driver takes a state away when the shard that went on from it is finished.

Nothing depends on these files but time: a worker that finds none, or a damaged one, reads the document again
from its start.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import StorageFailure
from pipeline.settings import is_url
from pipeline.shards import Shard

if TYPE_CHECKING:
    import engine
    from pipeline.worker import WorkerSpec

_PREFIX = ".state-"
_KEPT_S = 7 * 24 * 3600.0  # of what other runs left in a node's own folder
log = logging.getLogger(__name__)


def is_own(spec: WorkerSpec) -> bool:
    """Whether each node has the run's states for itself."""
    return spec.collect or is_url(spec.run_dir)


def place(spec: WorkerSpec) -> Path:
    """Where the states of a run lie, seen from this node."""
    return Path(spec.cache_dir) / "states" / spec.run_key if is_own(spec) else Path(spec.run_dir)


def prepared(spec: WorkerSpec) -> Path:
    """`place`, made where it is the node's own; what runs that never ended left there long ago goes.

    Raises:
        StorageFailure: it cannot be made.
    """
    folder = place(spec)
    if not is_own(spec) or folder.exists():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailure(
            f"{folder}: cannot be made: {error.strerror}", "paths.cache must be a folder that can be written"
        ) from error
    for other in folder.parent.iterdir():
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > _KEPT_S:
                shutil.rmtree(other)
    return folder


def state_path(run_dir: Path, first_window: int) -> Path:
    """Where the state lies that the shard beginning with this window goes on from."""
    return run_dir / f"{_PREFIX}{first_window:08d}"


def leave(run_dir: Path, first_window: int, cache: engine.Cache, slot: int, model_sha256: str) -> None:
    """Save a slot's sequence for the shard that begins with `first_window`; nothing is done if one is there.

    Raises:
        StorageFailure: it cannot be written.
    """
    import engine

    final = state_path(run_dir, first_window)
    if final.exists():
        return
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        engine.save_state(temporary, cache, model_sha256, slot=slot)
        with suppress(FileExistsError):
            os.link(temporary, final)
    except OSError as error:
        raise StorageFailure(
            f"{final}: the document's state cannot be written: {error.strerror or error}",
            "make room or repair it, and run the same command again: finished shards are kept",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def take_up(
    run_dir: Path, first_window: int, cache: engine.Cache, slot: int, model_sha256: str, position: int
) -> bool:
    """Put the state that a shard goes on from into a slot; False, and said, where there is none to be used.

    Args:
        position: that the state must stand at.
    """
    import engine

    path = state_path(run_dir, first_window)
    try:
        engine.restore_state(path, cache, model_sha256, slot=slot)
        found = cache.length(slot)
        if found == position:
            return True
        reason = f"{path}: stands at position {found}, expected {position}"
    except (OSError, engine.EngineError) as error:
        reason = str(error)
    log.warning(
        "window %d goes on from a state that is not there; its document is read again from its start (%s)",
        first_window,
        reason,
    )
    return False


def drop(run_dir: Path, shards: Iterable[Shard]) -> None:
    """Take away the states that these shards went on from."""
    for shard in shards:
        if shard.resumes:
            with suppress(OSError):
                state_path(run_dir, shard.first_window).unlink(missing_ok=True)


def drop_all(run_dir: Path) -> None:
    """Take away all states of a run that is finished, those that were never finished writing too."""
    for path in run_dir.glob(f".*{_PREFIX[1:]}*"):  # those being written have a dot more
        with suppress(OSError):
            path.unlink(missing_ok=True)
