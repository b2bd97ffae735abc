"""From the tensors of a checkpoint to those of a GGUF file: what goes where, checked before a weight is read.

An architecture lists its slots, one for every kind of tensor: its name in GGUF, in the checkpoint, and its
shape there, as config.json has it. `bind` finds the checkpoint's tensor for each; one that no slot wants, one
that is missing, and one of another shape are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.convert.checkpoint import Checkpoint
from pipeline.convert.tensors import Tensor, same_values
from pipeline.errors import ModelError

Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True, eq=False)
class Slot:
    """A kind of tensor; `{}` in its names is the layer.

    Attributes:
        name: in GGUF.
        source: in the checkpoint, after `canonical` of `bind`.
        shape: in the checkpoint.
        shape_there: in GGUF, where it differs.
        is_matrix: stored in the type that the user chose; all else is F32.
        is_optional: may be missing.
        zeros: written as zeros where it is missing.
        order: the row of the checkpoint's tensor that each row of GGUF's is.
        change: what is done to the values.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    shape_there: tuple[int, ...] = ()
    is_matrix: bool = False
    is_optional: bool = False
    zeros: bool = False
    order: NDArray[np.int64] | None = None
    change: Change | None = None


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor of the GGUF file: rows of `source`, then rows of zeros, or `values` as they are."""

    name: str
    shape: tuple[int, ...]
    is_matrix: bool = False
    source: Tensor | None = None
    order: NDArray[np.int64] | None = None
    change: Change | None = None
    values: NDArray[np.float32] | None = None

    @property
    def n_rows(self) -> int:
        """Rows of the last axis' length."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def n_columns(self) -> int:
        """Weights in a row."""
        return self.shape[-1]


@dataclass(frozen=True, eq=False)
class Plan:
    """A GGUF file but for its tokenizer.

    Attributes:
        architecture: general.architecture.
        metadata: the architecture's keys, their values as `writer` takes them.
        targets: tensors in the file's order.
        n_rows: rows of the checkpoint's embedding.
        n_vocab: rows of the file's: n_rows and rows of zeros.
        tied: the embedding is the output layer too.
        warnings: for the user.
    """

    architecture: str
    metadata: dict[str, Any]
    targets: list[Target]
    n_rows: int
    n_vocab: int
    tied: bool
    warnings: list[str] = field(default_factory=list)


def bind(
    checkpoint: Checkpoint,
    slots: Sequence[Slot],
    n_layers: int,
    *,
    canonical: Callable[[str], str] = str,
    ignored: str = r"(?!)",
) -> dict[str, Target]:
    """The targets of all slots of all layers, by name in GGUF, in the order of `slots`, layers last.

    Args:
        canonical: a tensor's name in the checkpoint -> as slots have it.
        ignored: tensors that are computed from others, by name.

    Raises:
        ModelError: a tensor of the checkpoint has no slot, a slot no tensor, or the shapes differ.
    """
    wanted = dict(_spread(slots, n_layers))  # by name in the checkpoint
    found: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        source = canonical(name)
        if source not in wanted:
            if re.search(ignored, name):
                continue
            raise _stranger(tensor, source, wanted, n_layers, checkpoint)
        if source in found:
            raise ModelError(
                f"{tensor.path}: tensors {found[source].name!r} and {name!r} are the same one by their names",
                "remove one of them",
            )
        found[source] = tensor
    missing = [
        name
        for name, (slot, _) in wanted.items()
        if name not in found and not (slot.is_optional or slot.zeros)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{checkpoint.folder}: tensor {missing[0]!r}{more} missing, "
            f"which {checkpoint.config.path.name} asks for",
            "is a file of the model missing, or config.json another model's?",
        )
    targets = {}
    for source, (slot, name) in wanted.items():
        shape = slot.shape_there or slot.shape
        if source in found:
            target = _target(slot, name, shape, found[source], checkpoint)
        elif slot.zeros:
            target = Target(name, shape, values=np.zeros(shape, np.float32))
        else:
            continue
        targets[name] = target
    return targets


def rows_of_embedding(targets: dict[str, Target]) -> int:
    """Rows of the checkpoint's embedding."""
    source = targets[EMBEDDING].source
    assert source is not None, "the slot is not optional"
    return source.n_rows


def tie(targets: dict[str, Target], checkpoint: Checkpoint) -> bool:
    """Takes the output layer out where it is the embedding, and says whether it is.

    Raises:
        ModelError: config.json says so, and the two differ; or it says that there is one, and there is none.
    """
    flag = checkpoint.config.get("tie_word_embeddings", "tie_embeddings")
    output = targets.get(OUTPUT)
    if output is None:
        if flag is False:
            raise checkpoint.config.refusal(
                "tie_word_embeddings is false, but the checkpoint has no output layer",
                "is a file of the model missing?",
            )
        return True
    first, second = targets[EMBEDDING].source, output.source
    assert first is not None
    assert second is not None
    if same_values(first, second):
        del targets[OUTPUT]
        return True
    if flag is True:
        raise checkpoint.config.refusal(
            f"tie_word_embeddings is true, but {second.name!r} is not {first.name!r}",
            "set tie_word_embeddings to false if the model was trained so",
        )
    return False


def pad_rows(target: Target, n_rows: int) -> Target:
    """The target with rows of zeros behind its own."""
    return Target(target.name, (n_rows, *target.shape[1:]), target.is_matrix, target.source)


def _spread(slots: Iterable[Slot], n_layers: int) -> Iterable[tuple[str, tuple[Slot, str]]]:
    """Every slot of every layer: name in the checkpoint, slot, name in GGUF."""
    per_layer = [slot for slot in slots if "{}" in slot.name]
    for slot in slots:
        if "{}" not in slot.name:
            yield slot.source, (slot, slot.name)
    for layer in range(n_layers):
        for slot in per_layer:
            yield slot.source.format(layer), (slot, slot.name.format(layer))


def _target(slot: Slot, name: str, shape: tuple[int, ...], source: Tensor, checkpoint: Checkpoint) -> Target:
    # The original Mamba squeezes its convolution's weights in some files and not in others.
    if tuple(n for n in source.shape if n != 1) != tuple(n for n in slot.shape if n != 1):
        raise ModelError(
            f"{source.path}: tensor {source.name!r} has the shape {list(source.shape)}, "
            f"but by {checkpoint.config.path.name} it is {list(slot.shape)}",
            "is config.json the one that belongs to these weights?",
        )
    return Target(name, shape, slot.is_matrix, source, slot.order, slot.change)


def _stranger(
    tensor: Tensor, source: str, wanted: dict[str, tuple[Slot, str]], n_layers: int, checkpoint: Checkpoint
) -> ModelError:
    """Of a tensor that no slot wants, naming the one that was meant."""
    layer = re.search(r"\.layers\.(\d+)\.", source)
    if layer and int(layer[1]) >= n_layers:
        template = source.replace(layer[0], ".layers.0.")
        if template in wanted:
            return ModelError(
                f"{tensor.path}: tensor {tensor.name!r} is of layer {layer[1]}, "
                f"but {checkpoint.config.path.name} has {n_layers} layers, from 0",
                "is config.json the one that belongs to these weights?",
            )
    near = difflib.get_close_matches(source, wanted, n=1, cutoff=0.0)
    return ModelError(
        f"{tensor.path}: tensor {tensor.name!r} has no place in the architecture; "
        f"the nearest that has one is {near[0]!r}",
        "the checkpoint has parts that GGUF has no tensors for, or is of another architecture",
    )
