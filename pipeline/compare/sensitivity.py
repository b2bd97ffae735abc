"""Which tensors need bits: groups of a variant's tensors in the base's place, one group at a time.

    swaps.py     tensors -> groups -> members
    here         their pairs, computed in rounds as many at a time as memory holds, and what they say
    proposal.py  groups of both files for a given size

A group that costs much divergence for each byte that it saves wants to stay as it is in the base. Divergences
are of one group at a time; what is made of several assumes that they add up, and the summary says how far
they do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.compare import conclude, proposal
from pipeline.compare.logit_files import FORMAT
from pipeline.compare.models import Member
from pipeline.compare.plan import Checked, Planned, begin, beside, check_memory
from pipeline.compare.swaps import Group, grouped, overhead, swapped, tensor_bytes, that_differ
from pipeline.compare.worker import states_folder
from pipeline.errors import SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.compare.conclude import Finished
    from pipeline.executor import ShardFailure
    from pipeline.shards import Shard

MOST_AT_ONCE = 16
"""Swaps that a worker has open at once; each takes a cache and activations of its own."""

BLANK: dict[str, Any] = {"sensitivity": None, "additivity": None, "kld_by_position": None, "mixture": None}
"""What the summary has where none of it was asked."""

Compute = Callable[[Planned, "dict[str, dict[Shard, Path]]"], "Sequence[ShardFailure]"]
"""Computes what is missing of a comparison; the mapping has, and gets, the finished shards of each pair."""

_FIGURES = ("kld_mean", "kld_stderr_clustered", "ln_ratio", "ln_ratio_stderr_clustered", "same_top")


@dataclass(frozen=True)
class Swaps:
    """What is asked, known to be possible.

    Attributes:
        is_all: whether base and variant differ in nothing but the groups.
        target_bytes: size of the file that a mixture shall fit into, None for no mixture.
    """

    variant: Member
    groups: list[Group]
    is_all: bool
    target_bytes: int | None
    remarks: list[str]

    def told(self) -> dict[str, Any]:
        """As a dry run has it."""
        return {
            "sensitivity": [
                {"group": g.name, "n_tensors": len(g.tensors), "bytes_saved": g.bytes_saved}
                for g in self.groups
            ]
        }


def check(checked: Checked) -> Swaps | None:
    """The swaps that are asked for; None where none are, or the variant is not made yet.

    Raises:
        SettingsError: an expression finds nothing, nothing differs, the size cannot be reached.
    """
    settings, base = checked.settings.sensitivity, checked.base
    if not settings.is_asked:
        return None
    if base.type == FORMAT:
        raise SettingsError(
            f"sensitivity: {base.path} holds logits, no tensors to swap", "give a model as base.path"
        )
    groups = grouped(settings, base.file)
    if not checked.files:
        return None
    variant = checked.files[0]
    found, remarks, is_all = that_differ(groups, base, variant)
    target = proposal.target_bytes(settings, base, variant, found)
    return Swaps(variant, found, is_all, target, remarks)


def measured(
    comparison: Planned, swaps: Swaps, whole: dict[str, Any], rows: pa.Table, compute: Compute
) -> dict[str, Any]:
    """Compute the swaps, and the mixture if one is asked for: the summary's keys for them.

    Args:
        comparison: of base and variant, complete.
        whole: the variant's figures; `rows` what they are from.

    Raises:
        IncompleteError: shards were set aside; what is finished stays.
        StorageFailure: a table cannot be written or read back.
    """
    base, variant = comparison.base, swaps.variant
    members = [swapped(base, variant, group.name, group.tensors) for group in swaps.groups]
    found = _figures(comparison, members, compute)
    entries = [
        {
            "group": group.name,
            "n_tensors": len(group.tensors),
            "bytes_saved": group.bytes_saved,
            **figures,
            "kld_per_mb": 1e6 * figures["kld_mean"] / group.bytes_saved if group.bytes_saved > 0 else None,
        }
        for group, figures in zip(swaps.groups, found, strict=True)
    ]
    told = BLANK | {
        "sensitivity": sorted(entries, key=_rank),
        "additivity": _together(entries, whole) if swaps.is_all else None,
        "kld_by_position": drift(rows),
    }
    if swaps.target_bytes is None:
        return told
    needed = overhead(base, variant) + tensor_bytes(base) - swaps.target_bytes
    chosen = proposal.chosen(swaps.groups, entries, needed)
    names = [tensor for group in chosen for tensor in group.tensors]
    mixed = swapped(base, variant, "mixture", names)
    [figures] = _figures(comparison, [mixed], compute)
    klds = {entry["group"]: entry["kld_mean"] for entry in entries}
    mixture = proposal.told(comparison, mixed, chosen, swaps.target_bytes)
    expected = sum(klds[group.name] for group in chosen)
    return told | {"mixture": mixture | figures | {"kld_expected": expected}}


def _rank(entry: dict[str, Any]) -> tuple[float, float]:
    """What needs its bits most first; what saves none last."""
    per_mb = entry["kld_per_mb"]
    return (1.0, -entry["kld_mean"]) if per_mb is None else (0.0, -per_mb)


def _together(entries: Sequence[dict[str, Any]], whole: dict[str, Any]) -> dict[str, Any]:
    """How far divergences of the groups add up to the variant's."""
    total, together = sum(entry["kld_mean"] for entry in entries), whole["kld_mean"]
    return {"kld_sum": total, "kld_together": together, "ratio": total / together if together else None}


def drift(rows: pa.Table) -> dict[str, float] | None:
    """Slope of divergence over position, `analysis.drift`; None where targets were not kept."""
    from pipeline.compare import analysis
    from pipeline.compare.report import binned

    targets = binned.targets(rows)
    slope = None if targets is None else analysis.drift(targets)
    return None if slope is None else slope._asdict()


def _figures(comparison: Planned, members: Sequence[Member], compute: Compute) -> list[dict[str, Any]]:
    """Figures of each member against the base; what is not there yet is computed, some members at a time."""
    told: list[dict[str, Any]] = []
    for some in _rounds(beside(comparison, members)):
        stage = begin(some)
        finished = {pair.key: dict(pair.finished.paths) for pair in stage.pairs}
        failures = compute(stage, finished)
        for failure in failures:
            for pair in stage.pairs:
                path = pair.folder / failure.shard.file_name
                if failure.shard in pair.shards and path.exists():
                    finished[pair.key][failure.shard] = path
        told += _concluded(stage, finished, failures)
        for model in (stage.base, *(pair.variant for pair in stage.pairs)):
            shutil.rmtree(states_folder(stage.states, model.sha256), ignore_errors=True)
    return told


def _concluded(stage: Planned, finished: Finished, failures: Sequence[ShardFailure]) -> list[dict[str, Any]]:
    if lacking := conclude.missing(stage, finished, stage.order):
        raise conclude.incomplete(lacking, failures)
    rows = conclude.tables(stage, finished, stage.order)
    variants = conclude.conclusion(stage, rows, stage.order, {})["variants"]
    return [
        {
            **{name: told[name] for name in (*_FIGURES, "n_windows", "pair_key")},
            "kld_by_position": drift(rows[told["pair_key"]]),
        }
        for told in variants
    ]


def _rounds(stage: Planned) -> list[Planned]:
    """As many pairs at a time as fit into memory, at most `MOST_AT_ONCE`.

    Raises:
        SettingsError: not even one fits.
    """
    size = min(MOST_AT_ONCE, max(1, len(stage.pairs)))
    while True:
        cut = [stage.pairs[at : at + size] for at in range(0, len(stage.pairs), size)]
        rounds = [replace(stage, pairs=pairs) for pairs in cut]
        try:
            for some in rounds:
                check_memory(some)
        except SettingsError:
            if size == 1:
                raise
            size //= 2
        else:
            return rounds
