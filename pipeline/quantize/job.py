"""A GGUF file in, the same model in other types out: everything is checked, then it is streamed."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

import engine
from pipeline import gguf_writer
from pipeline.errors import ModelError, StoreError
from pipeline.quantize.imatrix_file import Imatrix, read_imatrix
from pipeline.quantize.plan import Plan, Planned, make_plan
from pipeline.quantize.settings import QuantizeSettings
from pipeline.quantize.stream import Encoder, decoded
from pipeline.quantize.types import check_mixture

_log = logging.getLogger(__name__)


def run(settings: QuantizeSettings) -> dict[str, Any]:
    """Quantizes a model and returns the job's keys (contract.md 5).

    `bytes` is the output's size, `bpw` bits per weight over all its tensors, `gb_per_s` bytes of the input's
    tensors over the time of writing. With `dry_run` everything is checked but the weights' values, `tensors`
    lists every tensor, and nothing is written.

    Raises:
        RefusedError: the model, the settings, the imatrix or the place of the output cannot be used; or a
            weight is not finite, or too large for its type. Nothing is left.
        StorageFailure: the file could not be written; nothing is left of it.
    """
    began = time.monotonic()
    settings.validate()
    s = settings.resolved()
    out, mixture = Path(s.quantize.out), check_mixture(s.quantize.type)
    with _opened(s.model.path) as file:
        imatrix = None if s.quantize.imatrix is None else read_imatrix(s.quantize.imatrix)
        _check_apart(out, file, s.quantize.imatrix)
        plan = make_plan(file, mixture, s.rules(), imatrix, allow_requantize=s.quantize.allow_requantize)
        gguf_writer.check_place("quantize.out", out, plan.n_bytes, overwrite=s.quantize.overwrite)
        for warning in plan.warnings:
            _log.warning("%s", warning)
        summary: dict[str, Any] = {
            "out": str(out),
            "sha256": None,
            "type": mixture.name,
            "architecture": file.metadata.get("general.architecture"),
            "source_bytes": file.n_bytes,
            "bytes": plan.n_bytes,
            "bpw": plan.bits_per_weight,
            "n_tensors": len(plan.tensors),
            "types": plan.types,
            "fallbacks": plan.fallbacks,
            "peak_anonymous_bytes": None,
            "gb_per_s": None,
            "load_s": time.monotonic() - began,
            "warnings": plan.warnings,
        }
        if s.dry_run:
            summary["tensors"] = [tensor.row() for tensor in plan.tensors]
        else:
            _log.info("quantizing %s to %s, %s", s.model.path, out, mixture.name)
            summary |= _write(file, plan, imatrix, out, s.engine.threads)
    return summary | {"wall_s": time.monotonic() - began}


def _write(
    file: engine.GGUFFile, plan: Plan, imatrix: Imatrix | None, out: Path, threads: int
) -> dict[str, Any]:
    compiling = time.monotonic()
    for tensor in {(t.source.type, t.entry.type): t for t in plan.tensors if not t.is_copied}.values():
        _warm_up(tensor)
    writing = time.monotonic()
    with Encoder(file, imatrix, threads) as encoder:
        written = gguf_writer.write(
            out,
            plan.fields,
            plan.entries,
            lambda rank: encoder.pieces(plan.tensors[rank]),
            plan.alignment,
        )
    wall_s = time.monotonic() - writing
    read = sum(tensor.source.n_bytes for tensor in plan.tensors)
    _log.info(
        "%s: %s bytes, %.2f bits per weight, %.1f s, sha256 %s",
        out, f"{written.n_bytes:,}", plan.bits_per_weight, wall_s, written.sha256,
    )  # fmt: skip
    return {
        "sha256": written.sha256,
        "bytes": written.n_bytes,
        "peak_anonymous_bytes": written.peak_anonymous_bytes,
        "gb_per_s": read / wall_s / 1e9,
        "compile_s": writing - compiling,
    }


def _warm_up(tensor: Planned) -> None:
    """Compiles what the tensor needs, by one thread: threads that compile the same at once only wait."""
    block = tensor.source.type.block_bytes * tensor.entry.type.block_size
    decoded(np.zeros(block, np.uint8), tensor.source.type)
    values = np.zeros((1, tensor.entry.type.block_size), np.float32)
    engine.quantize(values, tensor.entry.type.name)


def _opened(path: str) -> engine.GGUFFile:
    """The mapped file; ModelError where it cannot be read."""
    try:
        return engine.open(path)
    except engine.EngineError as error:
        said = str(error) if Path(path).name in str(error) else f"{path}: {error}"
        hint = "is it a GGUF model file, and did its download finish?"
        raise ModelError(said, hint, kind=type(error).__name__) from error
    except OSError as error:
        hint = "set model.path to a GGUF file, or choose a model by model=NAME"
        raise ModelError(f"{path}: {error.strerror or error}", hint, kind=type(error).__name__) from error


def _check_apart(out: Path, file: engine.GGUFFile, imatrix: str | None) -> None:
    """That the output is none of the inputs, under whatever name."""
    for path in (*file.paths, *([] if imatrix is None else [imatrix])):
        if out.exists() and out.samefile(path):
            raise StoreError(
                f"quantize.out: {out} is {path}, which is read while it is written", "give another name"
            )
