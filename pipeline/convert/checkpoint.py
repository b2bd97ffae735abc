"""A checkpoint's folder: config.json, and its tensors by name from one file or from many.

model.safetensors                  or  model.safetensors.index.json and the files that it names
pytorch_model.bin                  or  pytorch_model.bin.index.json and the files that it names
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.convert.config import Config
from pipeline.convert.safetensors import read_safetensors
from pipeline.convert.tensors import Tensor
from pipeline.convert.torch_files import read_torch
from pipeline.errors import ModelError

_FORMATS: tuple[tuple[str, Callable[[Path], Iterator[Tensor]]], ...] = (
    ("model.safetensors", read_safetensors),
    ("pytorch_model.bin", read_torch),
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a folder holds: its configuration and its tensors by name."""

    folder: Path
    config: Config
    tensors: dict[str, Tensor]

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.data.nbytes for tensor in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a folder's configuration and maps its tensors.

    Raises:
        ModelError: the folder, its config.json or a file of weights is missing or broken.
    """
    if not folder.is_dir():
        raise ModelError(f"source.dir: there is no folder {folder}", "give the folder that has config.json")
    config = Config(folder / "config.json", read_json(folder / "config.json"))
    for name, read in _FORMATS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return Checkpoint(folder, config, _by_name([folder / name], read))
        if index.is_file():
            return Checkpoint(folder, config, _by_index(index, read))
    expected = " or ".join(f"{name} (or {name}.index.json)" for name, _ in _FORMATS)
    raise ModelError(f"{folder}: no weights; expected {expected}", "fetch the model's files into the folder")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: the file is missing or holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path}: {error.strerror}", "give the folder of a Hugging Face checkpoint as source.dir"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error})", "fetch the file again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no JSON object", "fetch the file again")
    return found


def _by_index(index: Path, read: Callable[[Path], Iterator[Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files that an index names; it and they must agree."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index}: no weight_map from tensors to files", "fetch the file again")
    files = sorted(set(places.values()))
    for name in files:
        if Path(name).name != name:
            raise ModelError(f"{index}: names the file {name!r}, expected one beside it")
        if not (index.parent / name).is_file():
            raise ModelError(
                f"{index}: names {name}, which is not there", f"fetch all {len(files)} files of the model"
            )
    tensors = _by_name([index.parent / name for name in files], read)
    for name, file in places.items():
        if name not in tensors or Path(tensors[name].path).name != file:
            raise ModelError(f"{index}: tensor {name!r} is not in {file}", "fetch the model's files again")
    return tensors


def _by_name(paths: list[Path], read: Callable[[Path], Iterator[Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            for tensor in read(path):
                if tensor.name in tensors:
                    raise ModelError(
                        f"{path}: tensor {tensor.name!r} is in {tensors[tensor.name].path} too",
                        "leave the files of one model in the folder",
                    )
                tensors[tensor.name] = tensor
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}", "check the file") from error
    return tensors
