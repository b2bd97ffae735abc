"""The same model in other weight types, for benchmarks: written by llama.cpp's own quantizer.

What was lost in the file that it starts from stays lost, so these files are good for speed and for nothing
else.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench.players import check_peers
from pipeline.bench.work import FILE_TYPES
from pipeline.errors import IncompleteError, SettingsError
from pipeline.settings import nearest

_NUMBERS = {name: number for number, name in FILE_TYPES.items()}
log = logging.getLogger(__name__)


def requantized(source: Path, folder: Path, types: Sequence[str]) -> list[Path]:
    """Files `STEM.TYPE.gguf` of a model in a folder, those that are not there yet written now.

    Args:
        source: a GGUF file; its own type, if asked for, is the file itself.
        types: such as "Q4_K_M", as llama.cpp names file types.

    Raises:
        SettingsError: an unknown type, or llama-cpp-python is not installed.
        IncompleteError: llama.cpp did not write a file.
    """
    import engine

    for name in types:
        if name not in _NUMBERS:
            raise SettingsError(f"{name} is not a file type of llama.cpp{nearest(name, list(_NUMBERS))}")
    with engine.open(source) as file:
        number = file.metadata.get("general.file_type")
    own = FILE_TYPES.get(number) if isinstance(number, int) else None
    stem = source.name.removesuffix(".gguf").removesuffix(f".{own}")
    made = [source if name == own else folder / f"{stem}.{name}.gguf" for name in types]
    missing = {name: path for name, path in zip(types, made, strict=True) if not path.exists()}
    if missing:
        check_peers(["llama_cpp"])
        folder.mkdir(parents=True, exist_ok=True)
    for name, path in missing.items():
        _write(source, path, name)
    return made


def _write(source: Path, path: Path, type_name: str) -> None:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = _NUMBERS[type_name], True
    params.nthread = len(os.sched_getaffinity(0))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
        if code != 0 or not partial.exists():
            raise IncompleteError(f"{path}: llama.cpp could not write it from {source} (code {code})")
        partial.replace(path)
        log.info("%s: %.0f MB", path, path.stat().st_size / 1e6)
    finally:
        partial.unlink(missing_ok=True)
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))
