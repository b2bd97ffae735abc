"""The checks of a suite, composed: each is one job's own settings, its limits, and what is traced of it.

A check measures in the invocation's own folder, on the suite's cluster, into no MLflow but the suite's; so it
cannot set any of those, nor what would make its windows others from one night to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import provenance
from pipeline.bench.players import PEERS
from pipeline.bench.settings import ThroughputSettings
from pipeline.compare.settings import CompareSettings
from pipeline.regression.limits import Limit
from pipeline.regression.settings import RegressionSettings, SuiteSettings
from pipeline.settings import (
    ClusterSettings,
    PerplexitySettings,
    TrackingSettings,
)

JobSettings = PerplexitySettings | CompareSettings | ThroughputSettings

_OF_THE_SUITE = "is the suite's: give it on the command line, for all checks"
BARRED = {
    "paths": _OF_THE_SUITE,
    "tracking": _OF_THE_SUITE,
    "cluster": f"{_OF_THE_SUITE}; a check may set cluster.workers and cluster.windows_per_shard",
    "seed": _OF_THE_SUITE,
    "dry_run": _OF_THE_SUITE,
    "limits": "are beside `set`, not in it",
    "sweep": "is many runs; give each a check of its own",
    "sort": "is of sweeps",
    "on_bad_point": "is of sweeps",
    "stop": "would have other windows every night; a check scores all that protocol.limit leaves",
    "logits": "writes a file; `pagemill compare` makes it once",
    "sensitivity": "has no figure that a suite could limit",
}
"""Keys, or what they begin with, that a check cannot set, and why."""
ALLOWED = ("cluster.workers", "cluster.windows_per_shard")


@dataclass(frozen=True)
class Check:
    """One job of a suite.

    Attributes:
        settings: composed; `at` puts them into a folder.
        n_traced: windows whose layers' checksums are kept.
        says: what is measured, in a line.
        given: what the suite sets, keys dotted.
        remarks: what of it is left out here.
    """

    name: str
    job: str
    settings: JobSettings
    limits: tuple[Limit, ...]
    n_traced: int
    says: str
    given: Mapping[str, Any]
    remarks: Sequence[str] = ()

    def at(self, results: Path) -> JobSettings:
        """The settings with everything kept under this folder."""
        return replace(self.settings, paths=replace(self.settings.paths, results=str(results)))


def suite_key(suite: SuiteSettings, checks: Sequence[Check]) -> str:
    """16 hex digits of a suite's name and of what its checks do; limits may change, and what is traced."""
    return provenance.key_of([suite.name, {check.name: [check.job, dict(check.given)] for check in checks}])


def bound(job: JobSettings, given: Mapping[str, Any], of: RegressionSettings) -> JobSettings:
    """A check's settings with what is the suite's in them; no MLflow."""
    cluster = of.cluster
    if isinstance(job, ThroughputSettings):  # each engine is a process here, whatever the cluster
        cluster = ClusterSettings("inline", workers=1, threads_per_worker=cluster.threads_per_worker)
    else:
        own = {key.partition(".")[2] for key in given if key in ALLOWED}
        cluster = replace(cluster, **{name: getattr(job.cluster, name) for name in own})
    none = TrackingSettings("none")
    return replace(job, cluster=cluster, tracking=none, paths=of.paths, seed=of.seed, dry_run=False)


def without_absent_peers(job: JobSettings, is_there: Mapping[str, bool]) -> tuple[JobSettings, list[str]]:
    """A throughput check with the peers that are installed, and a sentence for each that is not.

    Args:
        is_there: of `PEERS`, whether it is installed.
    """
    if not isinstance(job, ThroughputSettings):
        return job, []
    absent = [peer for peer in job.peer if peer in PEERS and not is_there[peer]]
    kept = [peer for peer in job.peer if peer not in absent]
    return replace(job, peer=kept), [
        f"peer {peer} is skipped, and the limits of ratio/{peer} with it: it is not installed here"
        for peer in absent
    ]


def says(job: JobSettings) -> str:
    """What is measured, in a line."""
    if isinstance(job, ThroughputSettings):
        models = ", ".join(Path(path).name for path in job.paths_of_models)
        beside = f" beside {', '.join(job.peer)}" if job.peer else ""
        return f"speed of {models}{beside}, {job.bench.repeats} rounds"
    windows = "all windows" if job.protocol.limit is None else f"{job.protocol.limit} windows"
    asked = f"{job.data.name}, {windows} of {job.protocol.window} tokens"
    if job.protocol.name != "windows":
        asked += f", protocol {job.protocol.name}"
    if isinstance(job, CompareSettings):
        variants = ", ".join(Path(variant).name for variant in job.variants)
        return f"{variants} beside {Path(job.base.path).name} on {asked}"
    return f"perplexity of {Path(job.model.path).name} on {asked}"
