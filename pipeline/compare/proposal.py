"""A mixture of a base's and a variant's tensors for a given size: what to give up first.

Groups are swapped in rising order of divergence per byte saved until the file is small enough, then those
taken back that were not needed after all, the costliest first. That is greedy and assumes that divergences of
groups add up; the mixture is evaluated, so what it really costs stands beside what was expected.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine
from pipeline import provenance
from pipeline.compare.models import Member
from pipeline.compare.settings import SensitivitySettings
from pipeline.compare.swaps import Group, kind_of, overhead, tensor_bytes
from pipeline.errors import SettingsError, StoreError
from pipeline.quantize.mixtures import MIXTURES, is_quantizable
from pipeline.quantize.types import FLOATS
from pipeline.results import ResultsSettings, Selection, results
from pipeline.settings import PathsSettings

if TYPE_CHECKING:
    from pipeline.compare.plan import Planned

_PLAIN = (
    "finished_at", "name", "bytes", "bpw", "n_windows", "ln_ratio", "ln_ratio_stderr_clustered", "kld_mean",
    "kld_stderr_clustered", "variant_model_sha256",
)  # fmt: skip


def target_bytes(
    settings: SensitivitySettings, base: Member, variant: Member, groups: Sequence[Group]
) -> int | None:
    """Size of the file that is asked for, None for none.

    Raises:
        SettingsError: no choice of groups has that size.
    """
    n_bytes, rest = tensor_bytes(base), overhead(base, variant)
    per_bit = n_bytes / (base.bpw or 1.0)  # bytes that one more bit per weight takes
    if settings.target_bytes is not None:
        target, told = settings.target_bytes, f"sensitivity.target_bytes={settings.target_bytes:,}"
    elif settings.target_bpw is not None:
        target = int(rest + settings.target_bpw * per_bit)
        told = f"sensitivity.target_bpw={settings.target_bpw:g}, {target:,} bytes"
    else:
        return None
    least = rest + n_bytes - sum(max(group.bytes_saved, 0) for group in groups)
    if least <= target < base.n_bytes:
        return target
    raise SettingsError(
        f"{told}: out of reach: {base.path} has {base.n_bytes:,} bytes, and {least:,} with all that the "
        f"groups of {variant.path} save",
        f"give sensitivity.target_bytes from {least} to {base.n_bytes - 1} "
        f"({(least - rest) / per_bit:.3f} to {base.bpw:.3f} bits per weight), or another variant",
    )


def chosen(groups: Sequence[Group], entries: Sequence[Mapping[str, Any]], needed: int) -> list[Group]:
    """The groups to swap so that at least `needed` bytes are saved, in the order of `groups`.

    Args:
        entries: of the groups, in the same order; read from them: `kld_mean`.
    """
    kld = {group.name: float(e["kld_mean"]) for group, e in zip(groups, entries, strict=True)}
    saving = [group for group in groups if group.bytes_saved > 0]
    saved, taken = 0, []
    for group in sorted(saving, key=lambda g: (kld[g.name] / g.bytes_saved, -g.bytes_saved)):
        if saved >= needed:
            break
        taken.append(group)
        saved += group.bytes_saved
    for group in sorted(taken, key=lambda g: -kld[g.name]):
        if saved - group.bytes_saved >= needed:
            taken.remove(group)
            saved -= group.bytes_saved
    return [group for group in groups if group in taken]


def told(comparison: Planned, mixed: Member, swapped: Sequence[Group], target: int) -> dict[str, Any]:
    """What the summary says of a mixture beside its figures."""
    made = recipe(comparison.base.file, mixed.file)
    return {
        "target_bytes": target,
        "bytes": mixed.n_bytes,
        "bpw": mixed.bpw,
        "groups": [group.name for group in swapped],
        "n_tensors": sum(len(group.tensors) for group in swapped),
        **made,
        "command": _command(comparison, mixed, made),
        "beside": _plain(comparison, mixed.n_bytes),
    }


def recipe(base: engine.GGUFFile, mixed: engine.GGUFFile) -> dict[str, Any]:
    """`quantize.type` and `quantize.tensor_types` that make the mixture from the base.

    Both None where a type cannot be written. The file is the mixture to the bit if the variant was made from
    this base by `quantize`, with the same importance matrix or none.
    """
    types = {
        name: tensor.type.name for name, tensor in mixed.tensors.items() if is_quantizable(name, tensor.shape)
    }
    kinds: dict[str, dict[str, list[str]]] = {}
    for name, type_name in types.items():
        kinds.setdefault(kind_of(name), {}).setdefault(type_name, []).append(name)
    if not types or not set(types.values()) <= engine.ENCODABLE:
        return {"type": None, "tensor_types": None}
    rules = [
        f"{pattern}={type_name}"
        for kind, by_type in kinds.items()
        for type_name, names in by_type.items()
        for pattern in [_pattern(kind, names, whole=len(by_type) == 1)]
    ]
    kept = Counter(tensor.type.name for name, tensor in base.tensors.items() if name in types)
    usual = [name for name, _ in kept.most_common()]
    named = [m.name for name in usual for m in MIXTURES.values() if m.type == name and not m.needs_imatrix]
    return {"type": next(iter(named), None), "tensor_types": rules}


def _command(comparison: Planned, mixed: Member, made: Mapping[str, Any]) -> str | None:
    """The recipe as a shell takes it; None where a type cannot be written."""
    base, imatrix = comparison.base, comparison.settings.quantize.imatrix
    if not made["type"] or not made["tensor_types"]:
        return None
    rules = ",".join(f'"{rule}"' for rule in made["tensor_types"])
    words = [
        f"model.path={base.path}",
        f"quantize.type={made['type']}",
        f"quantize.out={Path(base.path).name.removesuffix('.gguf')}-mixture.gguf",
        f"quantize.tensor_types=[{rules}]",
    ]
    changed = mixed.donor.tensors if mixed.donor else ()
    if any(base.file.tensors[name].type.name not in FLOATS for name in changed):
        words.append("quantize.allow_requantize=true")
    if imatrix is not None:
        words.append(f"quantize.imatrix={imatrix}")
    return " ".join(["pagemill quantize", *map(shlex.quote, words)])


def _pattern(kind: str, names: Sequence[str], *, whole: bool) -> str:
    """An expression that is found in these names and in no other."""
    end = rf"{re.escape(kind)}\.weight$"
    if not names[0].startswith("blk."):
        return f"^{end}"
    layers = "|".join(map(str, sorted(int(name.split(".")[1]) for name in names)))
    return rf"^blk\.\d+\.{end}" if whole else rf"^blk\.({layers})\.{end}"


def _plain(comparison: Planned, n_bytes: int) -> list[dict[str, Any]]:
    """Of the variants that were compared with this base under this measure, those next to a size."""
    asked = Selection(
        table="comparisons",
        filter={
            "measure_key": provenance.key_of(comparison.measure),
            "base_subject_key": provenance.key_of(comparison.base.subject),
        },
        where="exit_code in (0, 1) and kld_mean is not null",
        columns=list(_PLAIN),
    )
    folder = PathsSettings(comparison.settings.paths.results)
    try:
        rows = results(ResultsSettings(folder, asked)).rows
    except StoreError:  # none yet
        return []
    latest = {row["variant_model_sha256"]: row for row in sorted(rows, key=lambda row: row["finished_at"])}
    latest.pop(comparison.base.sha256, None)
    below = [row for row in latest.values() if row["bytes"] <= n_bytes]
    above = [row for row in latest.values() if row["bytes"] > n_bytes]
    near = [
        *sorted(above, key=lambda row: row["bytes"])[:1],
        *sorted(below, key=lambda row: -row["bytes"])[:1],
    ]
    return [{key: row[key] for key in _PLAIN[1:-1]} for row in near]
