"""The models of a comparison: a base, and variants of the same shape that read text into the same tokens.

What differs otherwise is refused by name: a divergence between two vocabularies means nothing, and paired
scores are of the same tokens. Context lengths may differ, weights and their types are what it is all about.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import provenance
from pipeline.bench.work import weight_type
from pipeline.compare.worker import Donor
from pipeline.errors import ModelError
from pipeline.preflight import model_digest, open_model
from pipeline.settings import EngineSettings

if TYPE_CHECKING:
    import engine

_TOKENIZER = "tokenizer.ggml."
_IDS = (
    "model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id",
    "add_bos_token", "add_eos_token", "add_space_prefix",
)  # fmt: skip
"""Keys that can change a text's token ids, in the order in which a difference is worth being told."""
_FREE = ("context_length", "rope.scaling.original_context_length", "rope.scaling.finetuned")
_ONE_MODEL = "a comparison is of one model in several forms: make the variants from the base's own weights"


@dataclass(frozen=True)
class Member:
    """A base or a variant; the driver has its file mapped.

    Attributes:
        name: short, and no other member's.
        type: file type, as llama.cpp calls it.
        bpw: bits per weight, None of a file without weights.
        subject: what `provenance.subject_of` says.
        donor: of the tensors that are not the base's, where `file` is the base but for these (swaps.py).
    """

    name: str
    path: str
    sha256: str
    type: str
    n_bytes: int
    bpw: float | None
    file: engine.GGUFFile
    subject: dict[str, Any]
    donor: Donor | None = None

    def told(self) -> dict[str, Any]:
        """As the JSON has it."""
        return {
            "name": self.name,
            "path": self.path,
            "type": self.type,
            "bytes": self.n_bytes,
            "bpw": self.bpw,
            "model_sha256": self.sha256,
        }


def member(file: engine.GGUFFile, name: str, settings: EngineSettings, cache: Path) -> Member:
    """A file that is open, digested.

    Raises:
        ModelError: it cannot be read.
    """
    sha256 = model_digest(file.path, cache)
    n_weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    n_bytes = sum(tensor.n_bytes for tensor in file.tensors.values())
    return Member(
        name=name,
        path=file.path,
        sha256=sha256,
        type=weight_type(file),
        n_bytes=file.n_bytes,
        bpw=8 * n_bytes / n_weights if n_weights else None,
        file=file,
        subject=provenance.subject_of(sha256, settings.kv, settings.activations),
    )


def open_variant(
    path: str, base: engine.GGUFFile, tokenizer: engine.Tokenizer, files: ExitStack
) -> engine.GGUFFile:
    """Map a variant and compare it with the base.

    Args:
        tokenizer: the base's.
        files: closes it.

    Raises:
        ModelError: it cannot be opened, or is another model than the base; says what differs first.
    """
    try:
        file = files.enter_context(open_model(path))
    except ModelError as error:
        hint = error.hint.replace("set model.path to a GGUF file, or choose a model by model=NAME", "")
        raise ModelError(
            str(error), hint or "every variant is a GGUF file or a type", kind=error.kind
        ) from error
    found = next(differences(base, tokenizer, file), None)
    if found is not None:
        raise ModelError(f"{path} is no variant of {base.path}: {found}", _ONE_MODEL)
    return file


def differences(base: engine.GGUFFile, tokenizer: engine.Tokenizer, file: engine.GGUFFile) -> Iterator[str]:
    """What makes a file another model than the base, in words, the most telling first."""
    mine, other = base.metadata, file.metadata
    key = "general.architecture"
    if mine[key] != other[key]:
        yield f"its architecture is {other[key]}, the base's {mine[key]}"
        return
    yield from _tokenizers(mine, other, tokenizer, file)
    prefix = f"{mine[key]}."
    for name in sorted(k for k in mine.keys() & other.keys() if k.startswith(prefix)):
        if name.removeprefix(prefix) not in _FREE and not _equal(mine[name], other[name]):
            yield f"{name} is {_short(other[name])}, the base's {_short(mine[name])}"
    rows = [n_logits(f) for f in (file, base)]
    if rows[0] != rows[1]:
        yield f"it gives {rows[0]:,} logits a token, padding included, the base {rows[1]:,}"


def named(paths: Sequence[str]) -> list[str]:
    """A short name for each path: its file's, with as much of its folders as tells it from the others."""
    parts = [Path(path).parts for path in paths]
    depth, longest = 1, max(map(len, parts), default=1)
    while depth < longest and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    clashing = Counter(p[-1] for p in parts)
    chosen = [p[-1:] if clashing[p[-1]] == 1 else p[-depth:] for p in parts]
    return ["/".join(p).removesuffix(".gguf") for p in chosen]


def distinct(base: Member, variants: Sequence[Member]) -> tuple[list[Member], list[str]]:
    """Variants with different content, the largest first and names made different; and what was left out."""
    kept: dict[str, Member] = {}
    remarks = []
    for variant in variants:
        first = kept.setdefault(variant.sha256, variant)
        if first is not variant:
            remarks.append(f"{variant.path} has the same content as {first.path}: run once, as {first.name}")
    names = Counter(variant.name for variant in kept.values())
    members = [
        replace(v, name=f"{v.name} ({v.sha256[:8]})") if names[v.name] > 1 else v for v in kept.values()
    ]
    if base.sha256 in kept:
        remarks.append(
            f"{kept[base.sha256].name} is the base itself: this is the floor, what a comparison shows of no "
            "difference at all"
        )
    return sorted(members, key=lambda v: (-v.n_bytes, v.sha256)), remarks


def _tokenizers(
    mine: Mapping[str, Any], other: Mapping[str, Any], tokenizer: engine.Tokenizer, file: engine.GGUFFile
) -> Iterator[str]:
    import engine

    keys = [_TOKENIZER + name for name in _IDS]
    unequal = [key for key in keys if not _equal(mine.get(key), other.get(key))]
    if not unequal:
        return
    try:
        if engine.Tokenizer(file).sha256 == tokenizer.sha256:  # one says what the other leaves to the default
            return
    except engine.EngineError as error:
        yield f"its tokenizer cannot be used: {error}"
        return
    for key in unequal:
        a: Any = mine.get(key)
        b: Any = other.get(key)
        if not (_is_list(a) and _is_list(b)):
            yield f"{key} is {_short(b)}, the base's {_short(a)}"
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        what, many = f"entry of {key}", f"entries of {key}"
        if key.endswith("tokens"):
            what, many = "token", "tokens"
        if at < min(len(a), len(b)):
            yield f"{what} {at} is {_short(b[at])}, the base's {_short(a[at])}"
        else:
            yield f"it has {len(b):,} {many}, the base {len(a):,}"


def n_logits(file: engine.GGUFFile) -> int | None:
    """Logits of a token: rows of the output matrix, padding included; None where there is none."""
    tensor = file.tensors.get("output.weight") or file.tensors.get("token_embd.weight")
    return None if tensor is None else int(tensor.shape[0])


def _equal(a: Any, b: Any) -> bool:
    if _is_list(a) and _is_list(b):
        return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not _is_list(a) and bool(a == b)


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and (isinstance(value, np.ndarray) or hasattr(value, "__getitem__"))


def _short(value: Any) -> str:
    if value is None:
        return "not said"
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
