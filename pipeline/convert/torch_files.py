"""PyTorch's own format, pickled names and shapes with the weights beside them; read by torch, if installed.

`weights_only=True` keeps the pickle from running code, and `mmap=True` keeps the weights on the disk.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.convert.tensors import DTYPES, Tensor
from pipeline.errors import ModelError


def read_torch(path: Path) -> Iterator[Tensor]:
    """The tensors of a `.bin` file, in the file's order.

    Raises:
        ModelError: torch is not installed; the file is no plain dictionary of float tensors.
        OSError: it cannot be opened.
    """
    try:
        import torch
    except ImportError as error:
        raise ModelError(
            f"{path}: only torch can read PyTorch's own format, and it is not installed",
            "pip install torch, or take the model's safetensors files",
        ) from error
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ModelError(
            f"{path}: torch cannot read it: {str(error).splitlines()[0]}",
            "is the download complete, and was it saved by torch 1.6 or later?",
        ) from error
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}, expected tensors by name")
    for name, value in found.items():
        if (
            not isinstance(value, torch.Tensor)
            or value.dtype not in kinds
            or 0 in (*value.shape, value.dim())
        ):
            what = getattr(value, "dtype", type(value).__name__)
            raise ModelError(
                f"{path}: {name!r} is {what}, expected a tensor of {', '.join(DTYPES)}",
                "convert a checkpoint that is not quantized",
            )
        dtype = kinds[value.dtype]
        flat = value.detach().contiguous().reshape(-1)
        bits = flat.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else flat.numpy()
        yield Tensor(str(name), str(path), dtype, tuple(value.shape), bits)
