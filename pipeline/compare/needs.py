"""What a comparison takes: of each node all its models at once; of time, what every model reads."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipeline.cluster import plan_of
from pipeline.compare.logit_files import FORMAT
from pipeline.compare.models import Member
from pipeline.compare.plan import Checked, Planned, tasks, worker_bytes
from pipeline.compare.sensitivity import MOST_AT_ONCE
from pipeline.estimate import Estimator, cached_files
from pipeline.perplexity import no_idle_workers
from pipeline.placement import Need
from pipeline.settings import is_url
from pipeline.shards import n_abreast, plan
from pipeline.topology import ModelFile

if TYPE_CHECKING:
    import engine

log = logging.getLogger(__name__)


def need_of(comparison: Planned, n_missing: int = 0) -> Need:
    """What its workers take.

    Args:
        n_missing: variants that are still to be made.

    Raises:
        StoreError: the token stream cannot be read.
    """
    s, asked = comparison.settings, comparison.asked
    variants = [pair.variant for pair in comparison.pairs if pair.todo]
    has_model = comparison.base.type != FORMAT
    models = dict(_model(member) for member in ([comparison.base] if has_model else []) + variants)
    if has_model and is_url(asked.settings.model.path):
        known = models.pop(comparison.base.path)
        url = asked.settings.model.path
        models = {url: ModelFile(url, known.n_bytes, known.cached_bytes, known.sha256), **models}
    base = ModelFile(comparison.base.path, comparison.base.n_bytes, sha256=comparison.base.sha256)
    return Need(
        threads=s.engine.threads,
        worker_bytes=worker_bytes(comparison, n_missing),
        models=tuple(models.values()),
        load=s.engine.load,
        cache=s.paths.cache,
        limit_bytes=s.paths.limit_bytes,
        at_once=True,
        files=() if has_model else (base,),
        cached=cached_files(s.cluster, s.paths, [asked.stream]),
    )


def dry_plan(checked: Checked, comparison: Planned, n_swaps: int) -> dict[str, Any]:
    """Where workers would go and what that takes, said line by line as a run says it before it starts.

    Args:
        comparison: of the models that are there; those of `checked` that are missing are counted as the base.
        n_swaps: groups of tensors to be swapped, which are compared one by one.
    """
    s, asked = comparison.settings, comparison.asked
    n_missing = len(checked.missing)
    shards = [task.shard for task in tasks(comparison)]
    if n_missing or n_swaps:
        begins = asked.protocol.begins(asked.stream.tokens.size)
        shards = plan(asked.n_windows, s.cluster.windows_per_shard, begins)
    if not shards:
        return {"n_workers": 0, "nodes": [], "estimated_s": 0.0, "estimated_from": [], "memory_bytes": 0}
    need = need_of(comparison, n_missing)
    made = plan_of(no_idle_workers(asked.settings, n_abreast(shards)), need)
    for line in (*made.lines(), *made.remarks):
        log.info("%s", line)
    n_workers = len(made.places)
    seconds, how = _seconds(comparison, n_missing, n_swaps)
    return {
        "n_workers": n_workers,
        "nodes": made.told(),
        "estimated_s": seconds / max(1, min(n_workers, len(shards))),
        "estimated_from": how + _not_counted(checked, n_missing),
        "memory_bytes": need.model_bytes + need.locked_bytes + n_workers * need.own_bytes,
    }


def _model(member: Member) -> tuple[str, ModelFile]:
    """The file that a member's weights are in, and that differ from the base's; by its path."""
    import engine

    if member.donor is None:
        return member.path, _as_here(member.file, member.path, member.sha256)
    with engine.open(member.donor.path) as file:
        return member.donor.path, _as_here(file, member.donor.path, member.donor.sha256)


def _as_here(file: engine.GGUFFile, path: str, sha256: str) -> ModelFile:
    return ModelFile(path, file.n_bytes, min(file.n_bytes, file.resident_bytes()), sha256)


def _seconds(comparison: Planned, n_missing: int, n_swaps: int) -> tuple[float, list[str]]:
    """What one worker would take, and how that was estimated.

    Each member reads the windows of the pairs' shards that are missing; what is still to be made or swapped
    reads all of them, as fast as the base, which reads them again in each round of swaps.
    """
    s, asked, base = comparison.settings, comparison.asked, comparison.base
    windows: Counter[str] = Counter()
    members = {base.sha256: base}
    for pair in comparison.pairs:
        windows[pair.variant.sha256] += sum(shard.n_windows for shard in pair.todo)
        members[pair.variant.sha256] = pair.variant
    n_base = asked.n_windows if n_missing else sum(task.shard.n_windows for task in tasks(comparison))
    n_base += math.ceil(n_swaps / MOST_AT_ONCE) * asked.n_windows
    windows[base.sha256] += n_base + (n_missing + n_swaps) * asked.n_windows
    if base.type == FORMAT:
        del windows[base.sha256]
    estimator, seconds, how = Estimator(asked.settings), 0.0, []
    for sha256, n in windows.items():
        member = members[sha256]
        rate, why = estimator.rate(member.file, sha256, s.engine.threads, s.protocol.window)
        seconds += n * s.protocol.window / rate
        how.append(f"{member.name}: {why}")
    return seconds, how


def _not_counted(checked: Checked, n_missing: int) -> list[str]:
    """What of a comparison the estimate leaves out."""
    told = []
    if n_missing:
        told.append(f"making {n_missing} variants comes before, and is not counted")
    if checked.settings.logits.out is not None:
        told.append("writing logits.out comes before, and is not counted")
    if checked.settings.stop.name == "decided":
        told.append("stop=decided may end it earlier")
    return told
