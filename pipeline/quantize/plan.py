"""What becomes of every tensor, decided and checked before a weight is read.

The output has the tensors in llama-quantize's order, by layer and then by name, and its metadata: the input's
as they are, without split.*, then general.quantization_version, general.file_type and quantize.imatrix.*. So
the files of the two are equal byte for byte, but for one key: we write the name of the imatrix file without
its folder.

Where llama-quantize is more lenient: it stores a tensor in a type that fits if the rows do not divide by the
blocks of the one that the user chose, takes an imatrix of another model as long as the columns agree, and
weighs all columns the same where the imatrix saw no token. All of these are refused here; the last one but
for single experts of a stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import engine
from pipeline import gguf_writer
from pipeline.errors import ModelError, SettingsError
from pipeline.gguf_writer import TYPES, Entry
from pipeline.quantize.imatrix_file import Imatrix
from pipeline.quantize.mixtures import Assigned, Mixture, assign, is_quantizable, libllama_order
from pipeline.quantize.settings import Rule
from pipeline.quantize.types import FLOATS, WEIGHTED

_NAMED_AT_MOST = 8
_OF_PARTS = ("split.no", "split.count", "split.tensors.count")
_NOTHING = np.empty(0, np.uint8)


@dataclass(frozen=True, eq=False)
class Planned:
    """A tensor of the input and its place in the output.

    Attributes:
        wanted: the type that it would have if its rows were whole blocks of it.
    """

    source: engine.Tensor
    entry: Entry
    wanted: str

    @property
    def is_copied(self) -> bool:
        """Whether its bytes stay as they are."""
        return self.source.type == self.entry.type

    @property
    def n_matrices(self) -> int:
        """1, or the experts in a stack."""
        return self.entry.n_values // (self.n_rows * self.n_columns)

    @property
    def n_rows(self) -> int:
        """Rows of a matrix; a vector is one."""
        return self.entry.shape[-2] if len(self.entry.shape) > 1 else 1

    @property
    def n_columns(self) -> int:
        """Weights in a row."""
        return self.entry.shape[-1]

    @property
    def why(self) -> str:
        """Why it is not stored as wanted; empty if it is."""
        if self.wanted == self.entry.type.name:
            return ""
        return f"rows of {self.n_columns} weights are not whole blocks of {TYPES[self.wanted].block_size}"

    def row(self) -> dict[str, Any]:
        """For the JSON line of a dry run; `shape` has rows before columns."""
        n_bytes = self.entry.n_bytes
        return {
            "name": self.entry.name,
            "shape": list(self.entry.shape),
            "from": self.source.type.name,
            "to": self.entry.type.name,
            "bytes": n_bytes,
            "bits_per_weight": 8 * n_bytes / self.entry.n_values,
        }


@dataclass(frozen=True, eq=False)
class Plan:
    """A GGUF file but for its weights.

    Attributes:
        tensors: in the order of the output.
        fields: its metadata, as `gguf_writer` takes them.
        warnings: for the user.
    """

    tensors: list[Planned]
    fields: list[bytes]
    alignment: int
    warnings: list[str]

    @cached_property
    def entries(self) -> list[Entry]:
        """The tensors as the writer takes them."""
        return [tensor.entry for tensor in self.tensors]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return gguf_writer.file_bytes(self.fields, self.entries, self.alignment)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together, as llama-quantize counts: no metadata, no padding."""
        return (
            8 * sum(entry.n_bytes for entry in self.entries) / sum(entry.n_values for entry in self.entries)
        )

    @property
    def types(self) -> dict[str, int]:
        """Tensors of each type, the most common first."""
        return dict(Counter(entry.type.name for entry in self.entries).most_common())

    @property
    def fallbacks(self) -> list[dict[str, str]]:
        """Tensors that are not of the type that the mixture wants for them, and why."""
        return [
            {
                "tensor": tensor.entry.name,
                "wanted": tensor.wanted,
                "type": tensor.entry.type.name,
                "why": tensor.why,
            }
            for tensor in self.tensors
            if tensor.why
        ]


def make_plan(
    file: engine.GGUFFile,
    mixture: Mixture,
    rules: Sequence[Rule],
    imatrix: Imatrix | None,
    *,
    allow_requantize: bool,
) -> Plan:
    """The plan of a file.

    Raises:
        SettingsError: a rule that matches nothing or whose type cannot hold the rows; weights that are
            quantized already, and that was not allowed; a mixture that needs an imatrix.
        ModelError: a tensor that cannot be decoded, an imatrix that does not belong to the model, or that
            lacks what the mixture needs; as `mixtures.assign`.
    """
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if not shapes:
        raise ModelError(f"{file.path}: has no tensors", "is it a vocabulary, not a model?")
    chosen = _chosen(file, rules)
    known = (lambda name: name in imatrix.entries) if imatrix is not None else False
    assigned = assign(mixture, file.metadata, shapes.items(), known, chosen)
    tensors = [_planned(file.tensors[row.name], row) for row in assigned]
    tensors.sort(key=lambda tensor: libllama_order(tensor.entry.name))
    _check_sources(file, tensors, allow_requantize=allow_requantize)
    lacking = [row.name for row in assigned if row.lacks_weights]
    if lacking and imatrix is None:
        raise SettingsError(
            f"quantize.type={mixture.name} needs an importance matrix: "
            "at so few bits a file made without one is not worth having",
            "give quantize.imatrix=FILE, or take Q2_K",
        )
    if lacking and imatrix is not None:
        raise ModelError(
            f"{imatrix.path}: lacks {_some(lacking)}, and quantize.type={mixture.name} needs "
            "an importance matrix of each tensor that it makes Q2_K",
            "make one of this model by `pagemill imatrix`, or take Q2_K",
        )
    warnings = [] if imatrix is None else _check_imatrix(imatrix, file, tensors)
    return Plan(tensors, _fields(file, mixture, imatrix), file.alignment, warnings)


def _planned(tensor: engine.Tensor, row: Assigned) -> Planned:
    type_ = tensor.type if row.type is None else TYPES[row.type]
    return Planned(tensor, Entry(tensor.name, tensor.shape, type_), row.wanted_type or type_.name)


def _chosen(file: engine.GGUFFile, rules: Sequence[Rule]) -> dict[str, str]:
    """Types by tensor, of those that a rule is found in."""
    chosen: dict[str, tuple[Rule, str]] = {}
    for rule in rules:
        found = [name for name in file.tensors if rule.pattern.search(name)]
        ours = [name for name in found if is_quantizable(name, file.tensors[name].shape)]
        where = f"quantize.tensor_types: {rule.text!r}"
        if not found:
            example = next(iter(file.tensors))
            raise SettingsError(
                f"{where} matches no tensor of {file.path}", f"tensors are called as {example} is"
            )
        if not ours:
            raise SettingsError(
                f"{where} matches only tensors that always stay as they are: {_some(found)}",
                "norms, biases, convolutions and the like are never quantized: name matrices",
            )
        for name in ours:
            chosen.setdefault(name, (rule, where))
    for name, (rule, where) in chosen.items():
        columns, block = file.tensors[name].shape[-1], TYPES[rule.type].block_size
        if columns % block:
            fits = [other for other in sorted(engine.ENCODABLE) if columns % TYPES[other].block_size == 0]
            raise SettingsError(
                f"{where}: {name} has rows of {columns} weights, which are not whole blocks of {block}, "
                f"as {rule.type} has them",
                f"these types hold it: {', '.join(fits)}",
            )
    return {name: rule.type for name, (rule, _) in chosen.items()}


def _check_sources(file: engine.GGUFFile, tensors: Sequence[Planned], *, allow_requantize: bool) -> None:
    """That the weights that change can be read, and may."""
    changed = [tensor for tensor in tensors if not tensor.is_copied]
    for tensor in changed:
        if not is_decodable(tensor.source.type.name):
            raise ModelError(
                f"{file.paths[tensor.source.part]}: tensor {tensor.entry.name} is {tensor.source.type.name}, "
                "which cannot be decoded",
                "start from a file of the model in F32, F16 or BF16",
            )
    again = [tensor for tensor in changed if tensor.source.type.name not in FLOATS]
    if again and not allow_requantize:
        types = ", ".join(dict.fromkeys(tensor.source.type.name for tensor in again))
        raise SettingsError(
            f"{file.path}: {len(again)} of its tensors are quantized already ({types}); "
            "what they lost does not come back, and more is lost on top",
            "start from the model in F32, F16 or BF16, or give quantize.allow_requantize=true",
        )


def is_decodable(type_name: str) -> bool:
    """Whether the engine can decode a tensor type."""
    try:
        engine.dequantize(_NOTHING, type_name, 0)
    except engine.UnsupportedQuant:
        return False
    return True


def _check_imatrix(imatrix: Imatrix, file: engine.GGUFFile, tensors: Sequence[Planned]) -> list[str]:
    """That the imatrix was made for this model; warnings about what it does not know."""
    strangers = [name for name in imatrix.entries if name not in file.tensors]
    if strangers:
        raise ModelError(
            f"{imatrix.path}: knows {_some(strangers)}, which {file.path} does not have: "
            "it was made for another model",
            "make one for this model by `pagemill imatrix`",
        )
    unknown, unseen = [], []
    for tensor in tensors:
        name = tensor.entry.name
        entry = imatrix.entries.get(name)
        if entry is not None:
            imatrix.weights(name, tensor.n_columns, n_matrices=tensor.n_matrices)
        if tensor.is_copied or tensor.entry.type.name not in WEIGHTED:
            continue
        if entry is None:
            unknown.append(name)
        elif not entry.counts.any():
            raise ModelError(
                f"{imatrix.path}: {name} has counts of 0: no token was seen there",
                "make another with more text by `pagemill imatrix`",
            )
        elif not entry.counts.all():
            n_unseen = int((entry.counts == 0).sum())
            unseen.append(f"{name} ({n_unseen} of {entry.counts.size})")
    warnings = []
    unknown = [name for name in unknown if name.startswith("blk.")]  # the embedding and the output never are
    if unknown:
        warnings.append(f"{imatrix.path}: lacks {_some(unknown)}: in these all columns count the same")
    if unseen:
        warnings.append(
            f"{imatrix.path}: saw no token in some experts of {_some(unseen)}: "
            "in these all columns count the same"
        )
    return warnings


def _fields(file: engine.GGUFFile, mixture: Mixture, imatrix: Imatrix | None) -> list[bytes]:
    """The metadata of the output."""
    added: dict[str, Any] = {
        "general.quantization_version": 2,
        "general.file_type": mixture.file_type,
    }
    if imatrix is not None:
        added["quantize.imatrix.file"] = Path(imatrix.path).name
        if imatrix.datasets:
            added["quantize.imatrix.dataset"] = imatrix.datasets[0]
        added["quantize.imatrix.entries_count"] = len(imatrix.entries)
        if imatrix.chunk_count:
            added["quantize.imatrix.chunks_count"] = imatrix.chunk_count
    kept = [raw for key, raw in file.raw_metadata().items() if key not in {*added, *_OF_PARTS}]
    return kept + [gguf_writer.field(key, value) for key, value in added.items()]


def _some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more
