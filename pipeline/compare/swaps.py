"""Groups of tensors that differ between a base and a variant, and the base with a group of the variant's.

    names -> groups -> tensors that differ -> Swap: a member of the comparison as any other, but no file

A swap is a view of two mappings (`engine.with_tensors`). Its subject names both files and the tensors, so it
is stored, found again and resumed as a pair like all others.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline import provenance
from pipeline.compare.models import Member
from pipeline.compare.settings import SensitivitySettings
from pipeline.compare.worker import Donor
from pipeline.errors import SettingsError
from pipeline.quantize.mixtures import is_quantizable
from pipeline.settings import nearest

if TYPE_CHECKING:
    import engine

_LAYER = re.compile(r"blk\.\d+(?=\.)")
_KINDS_NAMED = 40


@dataclass(frozen=True)
class Group:
    """Tensors that take the variant's place in the base together.

    Attributes:
        tensors: in the base's order.
        bytes_saved: theirs in the base less theirs in the variant; negative where the variant's are larger.
    """

    name: str
    tensors: tuple[str, ...]
    bytes_saved: int


def kind_of(name: str) -> str:
    """What a tensor is in its layer: `blk.3.attn_q.weight` -> `attn_q`, `output.weight` -> `output`."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def grouped(settings: SensitivitySettings, file: engine.GGUFFile) -> dict[str, list[str]]:
    """Names of a file's tensors by group; a tensor belongs to the first group that is found in its name.

    Without regular expressions they are all matrices that `quantize` can change.

    Raises:
        SettingsError: an expression that is found in no name, or only in those of groups before it.
    """
    matrices = [name for name, tensor in file.tensors.items() if is_quantizable(name, tensor.shape)]
    kinds = list(dict.fromkeys(map(kind_of, matrices)))
    groups: dict[str, list[str]] = {}
    taken: dict[str, str] = {}
    for text in settings.groups:
        found = [name for name in file.tensors if re.search(text, name)]
        where = f"sensitivity.groups: {text!r}"
        if not found:
            raise SettingsError(
                f"{where} is found in no tensor's name of {file.path}{nearest(text, kinds[:_KINDS_NAMED])}",
                "a group is a regular expression that is searched in names such as "
                f"{next(iter(matrices or file.tensors), '?')}",
            )
        groups[text] = [name for name in found if name not in taken]
        if not groups[text]:
            raise SettingsError(
                f"{where} is found only in tensors of {taken[found[0]]!r}, which comes before it",
                "put the narrower expression first; a tensor belongs to the first that is found in its name",
            )
        taken |= dict.fromkeys(groups[text], text)
    if settings.groups and settings.way == "group":
        return groups
    chosen = [name for name in file.tensors if name in taken] if settings.groups else matrices
    told: dict[str, list[str]] = {}
    for name in chosen:
        told.setdefault(_group_of(name, settings.way), []).append(name)
    return told


def _group_of(name: str, way: str) -> str:
    if way == "tensor":
        return name.removesuffix(".weight")
    layer = _LAYER.match(name) if way == "layer" else None
    return layer[0] if layer else kind_of(name)


def differing(base: engine.GGUFFile, variant: engine.GGUFFile) -> list[str]:
    """Names of tensors that both have and that are not the same in both, in the base's order."""
    found = []
    for name, mine in base.tensors.items():
        other = variant.tensors.get(name)
        if other is not None and (
            mine.type != other.type or mine.shape != other.shape or not np.array_equal(mine.data, other.data)
        ):
            found.append(name)
    return found


def that_differ(
    groups: Mapping[str, Sequence[str]], base: Member, variant: Member
) -> tuple[list[Group], list[str], bool]:
    """The groups with what there is to swap, what to say of the rest, and whether nothing else differs.

    Raises:
        SettingsError: there is nothing to swap at all.
    """
    differ = differing(base.file, variant.file)
    mine, other = base.file.tensors, variant.file.tensors
    found, equal = [], []
    for name, members in groups.items():
        tensors = tuple(tensor for tensor in members if tensor in differ)
        if tensors:
            saved = sum(mine[tensor].n_bytes - other[tensor].n_bytes for tensor in tensors)
            found.append(Group(name, tensors, saved))
        else:
            equal.append(name)
    if not found:
        raise SettingsError(
            f"sensitivity: {variant.path} has the same {'' if not differ else 'chosen '}tensors as "
            f"{base.path}: there is nothing to swap",
            f"these differ: {', '.join(dict.fromkeys(map(kind_of, differ)))}"
            if differ
            else "take another variant",
        )
    remarks = []
    if equal:
        remarks.append(
            f"sensitivity: left out, since their tensors are the same in base and variant: {', '.join(equal)}"
        )
    is_all = sum(len(group.tensors) for group in found) == len(differ)
    return found, remarks, is_all


def swapped(base: Member, variant: Member, name: str, tensors: Collection[str]) -> Member:
    """The base with those tensors of the variant, as a member of a comparison."""
    import engine

    names = sorted(tensors)
    view = engine.with_tensors(base.file, variant.file, names)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    subject = {**base.subject, "swapped_from": variant.sha256, "swapped_names": digest}
    n_weights, n_bytes = _sizes(view)
    return replace(
        variant,
        name=name,
        sha256=hashlib.sha256(provenance.canonical_json(subject).encode()).hexdigest(),
        n_bytes=overhead(base, variant) + n_bytes,
        bpw=8 * n_bytes / n_weights,
        file=view,
        subject=subject,
        donor=Donor(variant.path, variant.sha256, tuple(names)),
    )


def tensor_bytes(member: Member) -> int:
    """Bytes of a file's tensors."""
    return _sizes(member.file)[1]


def overhead(base: Member, variant: Member) -> int:
    """Bytes of a file of both's tensors beside these: metadata and padding, of whichever has more."""
    return max(member.n_bytes - tensor_bytes(member) for member in (base, variant))


def _sizes(file: engine.GGUFFile) -> tuple[int, int]:
    """Weights, and bytes of tensors."""
    each = [(math.prod(tensor.shape), tensor.n_bytes) for tensor in file.tensors.values()]
    return sum(n for n, _ in each), sum(n for _, n in each)
