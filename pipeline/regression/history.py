"""How a suite's figures went from run to run, and where they changed.

    table=regressions  --read-->  Row  --series-->  Series  --change_points-->  places

Only what can be compared over machines and time is followed: perplexity, KL divergence, and speeds as shares
of the machine's own ceiling or as ratios to a peer of the same rounds. A series is of one measure: with
another text or protocol a new one begins.

Change points of a noisy series are those of Fearnhead and Rigaill 2019, Changepoint detection in the presence
of outliers, https://arxiv.org/abs/1609.07363: levels that change seldom are laid through the values so that

    sum of min(((value - level) / noise)^2, OUTLIER^2)  +  PENALTY for each change

is least; the loss that is cut off lets a single bad night pass. Values are logarithms where all are positive,
noise is the median step between neighbours over 0.6745 sqrt(2). We differ in the levels, which are the
values themselves and the middles between neighbours among them, and so need no functional pruning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.provenance import key_of
from pipeline.regression.outcome import Measured, Outcome

_log = logging.getLogger(__name__)

FIGURES = ("ppl", "kld_mean", "fma_share", "read_share", "ratio")
"""Metrics that are followed; ratio/PEER by its first part."""

LEAST = 6
"""Runs before a noisy series is judged."""
OUTLIER = 3.0
"""Noises from its level at which a value is worth no more than any farther one."""
PENALTY = 17.0
"""For each change. Of 1,000 series of 60 values without a change 0.4 % (Student's t, 3 degrees of freedom),
0.7 % (normal noise) and 2.3 % (exponential) get one; of those with 6 to 20 values 0.6 to 2.4 %. Where values
follow the one before with a correlation of 0.2 that is 5 %, with 0.4 it is 24 %: two nights of a machine that
others use are not independent."""

_COLUMNS = (
    "suite", "check", "variant", "data", "measure_key", "metrics", "finished_at", "version", "numerics",
    "git_sha", "cpu",
)  # fmt: skip


class Row(NamedTuple):
    """A figure of a run; `finished_at` is UTC, `measure` the key of its measure."""

    check: str
    variant: str
    data: str
    metric: str
    finished_at: datetime
    version: str | None
    numerics: int | None
    git_sha: str | None
    value: float
    measure: str
    cpu: str | None


@dataclass(frozen=True)
class Series:
    """A figure over time: rows of one check, variant, data, metric and measure, the oldest first."""

    rows: tuple[Row, ...]

    @property
    def id(self) -> tuple[str, str, str, str, str]:
        """What its rows have in common: check, variant, data, metric, measure."""
        row = self.rows[-1]
        return row.check, row.variant, row.data, row.metric, row.measure

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """(n,) float64, the figures."""
        return np.array([row.value for row in self.rows])

    @cached_property
    def changes(self) -> list[int]:
        """Its change points, as `change_points` has them."""
        return change_points(self.values)

    @cached_property
    def levels(self) -> NDArray[np.float64]:
        """(n,) float64, of each row the median of the stretch between change points that it is in."""
        parts = np.split(self.values, self.changes)
        return np.concatenate([np.full(part.size, np.median(part)) for part in parts])


def read(results: Path, suite: str) -> list[Row]:
    """The figures of every recorded run of a suite, the oldest first; [] where there are none.

    A file that cannot be read is left out, which is logged: a run's report does not fail for another run's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    for file in sorted((results / "v1" / "table=regressions").glob("run_key=*/run-*.parquet")):
        try:
            found = pq.read_table(file, columns=list(_COLUMNS), partitioning=None)
            microseconds = found["finished_at"].cast(pa.timestamp("us", tz="UTC"), safe=False)
            at = found.schema.get_field_index("finished_at")
            for record in found.set_column(at, "finished_at", microseconds).to_pylist():
                if record["suite"] == suite:
                    rows += _followed(record, dict(record["metrics"]))
        except (OSError, pa.ArrowException) as error:
            _log.warning("%s is left out of the history: it cannot be read: %s", file.name, error)
    return sorted(rows, key=lambda row: row.finished_at)


def with_today(rows: Iterable[Row], outcome: Outcome) -> list[Row]:
    """The history and this run, which may be in it already."""
    today = moment(outcome.provenance.get("finished_at"))
    if today is None:
        return list(rows)
    others = [row for row in rows if row.finished_at != today]
    return sorted([*others, *rows_of(outcome.measured, outcome.provenance)], key=lambda row: row.finished_at)


def rows_of(measured: Iterable[Measured], provenance: Mapping[str, Any]) -> list[Row]:
    """The figures of a run that are followed."""
    return [
        row
        for each in measured
        for row in _followed(
            {
                **provenance,
                "check": each.check,
                "variant": each.variant,
                "data": each.data,
                "measure_key": key_of(dict(each.measure)),
            },
            each.metrics,
        )
    ]


def moment(value: Any) -> datetime | None:
    """A time of provenance, in UTC; None where it is unknown."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def series(rows: Iterable[Row]) -> list[Series]:
    """Rows, the oldest first, as the series that they make; in the order of their first rows."""
    found: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.check, row.variant, row.data, row.metric, row.measure), []).append(row)
    return [Series(tuple(rows)) for rows in found.values()]


def change_points(values: Sequence[float] | NDArray[np.float64]) -> list[int]:
    """Where a series changes its level: indices of the first values after a change, rising.

    A series most of whose values are the very value before, as perplexities are while no bit moves, changes
    wherever a value does; a noisy one as the top of this file says, and not before `LEAST` values. Values
    that are not finite are passed over.
    """
    x = np.asarray(values, np.float64)
    places = np.flatnonzero(np.isfinite(x))
    x = x[places]
    steps = np.abs(np.diff(x))
    if steps.size and np.count_nonzero(steps == 0) * 2 >= steps.size:
        return [int(places[at + 1]) for at in np.flatnonzero(steps)]
    if x.size < LEAST:
        return []
    if (x > 0).all():
        x = np.log(x)
        steps = np.abs(np.diff(x))
    noise = float(np.median(steps)) / (0.6744897501960817 * math.sqrt(2))
    return [int(places[at]) for at in _segments(x / noise)] if noise > 0 else []


def _segments(x: NDArray[np.float64]) -> list[int]:
    """First places of all stretches but the first; x in units of its noise. O(n^2) time and memory."""
    distinct = np.unique(x)
    levels = np.concatenate([distinct, (distinct[1:] + distinct[:-1]) / 2])
    loss = np.minimum((x[:, None] - levels) ** 2, OUTLIER**2)
    cost = loss[0].copy()  # of all values so far, the last of them on that level
    begun = np.zeros(levels.size, np.intp)  # where that level began
    before = np.zeros(x.size, np.intp)  # where the stretch began that ends before this place
    for at in range(1, x.size):
        best = int(cost.argmin())
        before[at] = begun[best]
        changed = cost[best] + PENALTY
        begun[cost > changed] = at
        cost = np.minimum(cost, changed) + loss[at]
    found, at = [], int(begun[cost.argmin()])
    while at > 0:
        found.append(at)
        at = int(before[at])
    return found[::-1]


def _followed(record: Mapping[str, Any], metrics: Mapping[str, float | None]) -> list[Row]:
    """Rows of the figures of a measurement that are followed and known."""
    finished_at = moment(record.get("finished_at"))
    if finished_at is None:
        return []
    return [
        Row(
            check=record["check"],
            variant=record["variant"],
            data=record["data"],
            metric=metric,
            finished_at=finished_at,
            version=record.get("version"),
            numerics=record.get("numerics"),
            git_sha=record.get("git_sha"),
            value=value,
            measure=record["measure_key"],
            cpu=record.get("cpu"),
        )
        for metric, value in metrics.items()
        if is_followed(metric)
        if value is not None and math.isfinite(value)
    ]


def is_followed(metric: str) -> bool:
    """Whether a metric has a history."""
    return metric.partition("/")[0] in FIGURES


def example(n: int = 60) -> list[Row]:
    """Made-up rows of n nightly runs: three steps in a speed, one in a perplexity."""
    rng = np.random.default_rng(0)
    shares = np.repeat([0.80, 0.64, 0.78, 0.90], -(-n // 4))[:n] * np.exp(rng.normal(0, 0.04, n))
    ppl = np.where(np.arange(n) < n // 2, 22.4106, 22.3871)
    figures = (("pydoc", "pydoc", "ppl", ppl), ("speed", "ppl512", "fma_share", shares))
    begin = datetime(2026, 1, 1, 3, tzinfo=UTC)
    return [
        Row(
            check=check,
            variant="example",
            data=data,
            metric=metric,
            finished_at=begin + timedelta(days=at),
            version="0.2.0" if at >= n // 2 else "0.1.0",
            numerics=2 if at >= n // 2 else 1,
            git_sha=f"{at // 5:02x}" * 20,
            value=float(values[at]),
            measure="",
            cpu=None,
        )
        for at in range(n)
        for check, data, metric, values in figures
    ]
