"""The base's logits into a file of llama.cpp's (logit_files.py), window by window: `logits.out=FILE`.

The driver reads each window by itself and rounds a few rows of logits at a time, so memory does not grow with
the text. The file is written beside its place and moved there when it is whole.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

import engine
from pipeline.compare import logit_files
from pipeline.errors import ScoreError, SettingsError, StorageFailure
from pipeline.gguf_writer import check_place
from pipeline.runtime import available_cores
from pipeline.worker import first_compiles

if TYPE_CHECKING:
    from pipeline.compare.plan import Checked
    from pipeline.compare.settings import CompareSettings
    from pipeline.preflight import Asked
    from pipeline.progress import Progress

log = logging.getLogger(__name__)

LOGITS_BYTES = 64 << 20
"""Of float32 logits held at once, unless a single row has more."""


def streamed(
    model: engine.Model, batch: engine.Batch, cache: Any
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Decode a batch in as many calls as keep the logits few.

    Args:
        cache: one that keeps what it is told, not a fleeting one.

    Yields:
        tokens of the batch with targets, (n,), and their logits, (n, V) float32; together all such tokens in
        their order.
    """
    at_once = max(1, LOGITS_BYTES // (4 * model.n_vocab))
    wanted = batch.targets >= 0
    ends = [*np.flatnonzero(wanted)[at_once - 1 :: at_once] + 1, len(batch)]
    begin = 0
    for end in ends:
        if end > begin:
            piece = slice(begin, end)
            tokens, positions, slots = (a[piece] for a in (batch.tokens, batch.positions, batch.slots))
            part = engine.Batch(tokens, positions, slots, outputs=wanted[piece])
            yield begin + np.flatnonzero(wanted[piece]), model.logits(part, cache)
        begin = end


def check(settings: CompareSettings, asked: Asked, models: Sequence[str]) -> list[str]:
    """Refuse a file that could not be written; returns what it will weigh and what it distorts.

    Args:
        settings: resolved, with `logits.out`.
        models: files that must not be overwritten.

    Raises:
        SettingsError: the protocol is not that of such files, or the file is one of the models.
        StoreError: there is a file, or no room.
    """
    out, n_windows, window = Path(settings.logits.out or ""), asked.n_windows, settings.protocol.window
    if settings.protocol.name != "windows" or asked.stream.is_apart:
        told = (
            f"protocol={settings.protocol.name}, documents {'apart' if asked.stream.is_apart else 'joined'}"
        )
        raise SettingsError(
            f"logits.out: {told}; such a file holds windows of one text, each from an empty cache",
            "use protocol=windows and data.documents=joined",
        )
    if out.exists() and any(out.samefile(model) for model in models):
        raise SettingsError(f"logits.out: {out} is a model of this comparison", "give another name")
    n_vocab = _n_vocab(asked.file)
    needed = logit_files.file_bytes(window, n_vocab, n_windows)
    check_place("logits.out", out, needed, overwrite=settings.logits.overwrite)
    return [
        f"{out}: {needed:,} bytes, the base's logits in 16 bits each as llama.cpp writes them; those more "
        f"than {logit_files.CLIP_NATS} nats below the maximum are raised to {logit_files.CLIP_NATS} below, "
        "the others rounded to 65,536 steps. A perplexity read back from it is too low, and divergences from "
        "it have a floor: compare with the base itself where it can be had"
    ]


def write(checked: Checked, progress: Progress | None) -> dict[str, Any]:
    """Write the file; what the summary says of it.

    Returns:
        path, bytes, SHA-256, windows and targets; `ppl` of the logits themselves and `ppl_read_back` of the
        file; `clipped`, the share of logits that were raised.

    Raises:
        ScoreError: a logit is not finite.
        StorageFailure: the file could not be written. Nothing is left of it, as after Ctrl-C.
    """
    out, s = Path(checked.settings.logits.out or ""), checked.settings
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    if progress is not None:
        n_bytes = logit_files.file_bytes(
            s.protocol.window, _n_vocab(checked.asked.file), checked.asked.n_windows
        )
        progress.note(f"writing {out}: {n_bytes:,} bytes")
    try:
        with temporary.open("xb") as file:
            told = _write(file, checked, progress)
            file.flush()
            os.fsync(file.fileno())
        if out.exists() and not s.logits.overwrite:
            raise StorageFailure(f"{out}: was made by another program meanwhile", "give another name")
        temporary.replace(out)
    except OSError as error:
        raise StorageFailure(
            f"{out}: cannot be written: {error.strerror or error}; nothing is left of it",
            "make room and run the same command again",
            kind=type(error).__name__,
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if progress is not None:
            progress.stop()
    return {"path": str(out), **told}


def _write(file: BinaryIO, checked: Checked, progress: Progress | None) -> dict[str, Any]:
    asked, s, started = checked.asked, checked.settings, time.perf_counter()
    size, n_windows = s.protocol.window, asked.n_windows
    with first_compiles(Path(s.paths.cache) / "locks"):
        engine.warm_up(asked.file, s.engine.activations)
    model = engine.load_model(
        asked.file,
        threads=_threads(s),
        batch_tokens=min(s.engine.batch_tokens, size),
        activations=s.engine.activations,
    )
    cache = model.new_cache(1, size, s.engine.kv)
    digest, n_bytes, clipped, n_scored = hashlib.sha256(), 0, 0, 0
    sums: list[float] = []
    read_back: list[float] = []

    def put(raw: Any) -> None:
        nonlocal n_bytes
        file.write(raw)
        digest.update(raw)
        n_bytes += memoryview(raw).nbytes

    put(logit_files.header(size, model.n_vocab, asked.stream.tokens[: n_windows * size]))
    if progress is not None:
        progress.start(n_windows)
    for index in range(n_windows):
        window = asked.protocol.window(asked.stream.tokens, index)
        cache.clear()
        for begin in range(0, size, model.batch_tokens):
            piece = slice(begin, begin + model.batch_tokens)
            batch = engine.Batch(
                window.tokens[piece],
                np.arange(size, dtype=np.int32)[piece],
                targets=window.targets[piece],
            )
            for places, logits in streamed(model, batch, cache):
                for place, row in zip(places, logits, strict=True):
                    _check_finite(row, index, begin + int(place))
                    ln_sum, target = logit_files.ln_sum_exp(row), int(batch.targets[place])
                    found = logit_files.record(row, ln_sum)
                    put(found.data)
                    sums.append(ln_sum - float(row[target]))
                    read_back.append(-logit_files.ln_p_of(found, target))
                    clipped += int(np.count_nonzero(row < row.max() - logit_files.CLIP_NATS))
        if progress is not None:
            progress.advance(1, len(sums) - n_scored, math.fsum(sums[n_scored:]), size)
        n_scored = len(sums)
    assert n_bytes == logit_files.file_bytes(size, model.n_vocab, n_windows), "as announced"
    return {
        "bytes": n_bytes,
        "sha256": digest.hexdigest(),
        "n_windows": n_windows,
        "n_scored": n_scored,
        "ppl": _perplexity(sums),
        "ppl_read_back": _perplexity(read_back),
        "clipped": clipped / (n_scored * model.n_vocab),
        "wall_s": time.perf_counter() - started,
    }


def _threads(settings: CompareSettings) -> int:
    """Of all workers together, for no other works meanwhile."""
    threads, cores = settings.engine.threads, available_cores()
    if settings.cluster.kind == "inline":
        return threads
    return max(1, min(cores, threads * (settings.cluster.workers or cores)))


def _n_vocab(file: engine.GGUFFile) -> int:
    from pipeline.compare.models import n_logits

    found = n_logits(file)
    assert found is not None, "the preflight opened a model"
    return found


def _check_finite(row: npt.NDArray[np.float32], window: int, position: int) -> None:
    wrong = np.flatnonzero(~np.isfinite(row))
    if wrong.size:
        raise ScoreError(
            f"window {window}: the logit of token {wrong[0]} at position {position} is {row[wrong[0]]}, "
            f"expected a finite number ({wrong.size} of {row.size} are not)",
            "the model's weights overflow or hold NaN; check the file's SHA-256 and how it was made",
        )


def _perplexity(nll: list[float]) -> float | None:
    mean = math.fsum(nll) / len(nll)
    return math.exp(mean) if mean < 709 else None
