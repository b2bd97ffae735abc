"""Models in several files: `NAME-00001-of-00003.gguf`, `NAME-00002-of-00003.gguf`, ...

Each part is a GGUF file with tensors of its own. The first has the model's metadata, the others only what
makes them parts:

    split.no              u16, rank of the part, from 0 (the names count from 1)
    split.count           u16, number of parts; 0 or 1: the file is whole
    split.tensors.count   i32, tensors of all parts together

A part of another model with as many parts, the same tensors and shapes cannot be told from the right one: the
parts carry nothing of the model but its tensors. The model's digest tells.

Source: https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split, and gguf.constants.Keys.Split
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import GGUFFormatError

if TYPE_CHECKING:
    from engine.gguf import Part

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_PARTS = 65_535
_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_NAMED_AT_MOST = 3


def part_name(stem: str, no: int, count: int) -> str:
    """File name of part `no`, from 0."""
    return f"{stem}-{no + 1:05d}-of-{count:05d}.gguf"


def other_parts(path: str, metadata: Mapping[str, Any]) -> list[str]:
    """Paths of the parts after the first, none for a whole file; all are there.

    Args:
        path: of the file that was opened.
        metadata: of that file.

    Raises:
        GGUFFormatError: a later part was opened, the name does not fit, or parts are missing; names them.
    """
    count = _number(path, metadata, COUNT, 0, MAX_PARTS) or 0
    if count < 2:
        return []
    no = _number(path, metadata, NO, 0, count - 1)
    if no is None:
        raise GGUFFormatError(f"{path}: {COUNT} is {count} but {NO} is missing; split the model again")
    name = _NAME.fullmatch(Path(path).name)
    if name is None or (int(name["no"]), int(name["count"])) != (no + 1, count):
        stem = name["stem"] if name else Path(path).stem
        raise GGUFFormatError(
            f"{path}: part {no + 1:,} of {count:,} of a model, which its name does not say; the others are "
            f"found by it: rename it to {part_name(stem, no, count)}"
        )
    if no:
        first = Path(path).with_name(part_name(name["stem"], 0, count))
        raise GGUFFormatError(f"{path}: part {no + 1:,} of {count:,}; open the first one, {first}")
    folder, names = Path(path).parent, (part_name(name["stem"], i, count) for i in range(1, count))
    missing = list(islice((other for other in names if not (folder / other).exists()), _NAMED_AT_MOST + 1))
    if missing:
        named = ", ".join(missing[:_NAMED_AT_MOST]) + (" and more" if len(missing) > _NAMED_AT_MOST else "")
        raise GGUFFormatError(
            f"{path}: the first of {count:,} parts, but beside it is no {named}; is the download complete?"
        )
    return [str(folder / part_name(name["stem"], i, count)) for i in range(1, count)]


def check_parts(parts: Sequence[Part]) -> None:
    """That the parts, in order, are one model.

    Raises:
        GGUFFormatError: naming the part that is not, and why.
    """
    first, count = parts[0], len(parts)
    n_tensors = _number(first.path, first.metadata, TENSORS, 0, (1 << 63) - 1)
    homes: dict[str, Part] = {}
    for rank, part in enumerate(parts):
        if rank:
            wanted: dict[str, Any] = {COUNT: count, NO: rank}
            wanted |= {
                key: first.metadata.get(key)
                for key in (TENSORS, "general.architecture")
                if key in part.metadata
            }
            for key, expected in wanted.items():
                found = part.metadata.get(key)
                if (
                    not isinstance(found, (int, str))
                    or type(found) is not type(expected)
                    or found != expected
                ):
                    _stranger(part, f"{key} is {_told(found)}, expected {_told(expected)} as in", first)
        for name in part.tensors:
            if name in homes:
                _stranger(part, f"tensor {name!r:.80} is there already in", homes[name])
            homes[name] = part
    if count > 1 and n_tensors is not None and len(homes) != n_tensors:
        raise GGUFFormatError(
            f"{first.path}: its {count:,} parts hold {len(homes):,} tensors, "
            f"expected {n_tensors:,} ({TENSORS}); are all parts of one model?"
        )


def _stranger(part: Part, what: str, other: Part) -> None:
    raise GGUFFormatError(f"{part.path}: {what} {Path(other.path).name}; are they parts of one model?")


def _number(path: str, metadata: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    """An integer of the metadata, None where there is none."""
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        expected = f"expected an integer from {least:,} to {most:,}"
        raise GGUFFormatError(f"{path}: {key} is {_told(value)}, {expected}; split the model again")
    return value


def _told(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"
