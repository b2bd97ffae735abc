"""A grid of runs as one job: one pool of workers for every combination of settings.

All points are checked before the first one starts. Their shards stand in one queue, ordered so that a worker
opens each model file once, and a worker that has finished a point's last shard goes on with the next point's
first. What is finished is found in each point's own run folder, so a sweep is resumed by the same command,
and points that an earlier sweep or a single run computed are reused.

Points that come to the same run (the same model, text and protocol by content) are run once. A point that
cannot run refuses the sweep (`on_bad_point=refuse`) or is left out (`skip`), which ends it incomplete.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import RunResult, perplexity, provenance
from pipeline.errors import PipelineError, RefusedError, SettingsError
from pipeline.estimate import Estimator
from pipeline.folders import folder_of, tracking_folder
from pipeline.perplexity import Scoring
from pipeline.preflight import NotFetched, Preflight, Prepared
from pipeline.record import Journal, Parent
from pipeline.settings import PerplexitySettings, nearest
from pipeline.tracking import open_tracker

if TYPE_CHECKING:
    from pipeline.progress import Progress

_NAMED_AT_MOST = 5


@dataclass
class Point:
    """A combination of the axes' values, and the settings that it makes.

    Attributes:
        axes: keys and values as the sweep names them.
        settings: None when they cannot be made; `error` says why.
        also: axes of other points that come to the same run.
    """

    axes: dict[str, Any]
    settings: PerplexitySettings | None
    error: RefusedError | None = None
    also: list[dict[str, Any]] = field(default_factory=list)
    ready: Prepared | None = None

    @property
    def name(self) -> str:
        """For people: paths shortened to their last parts."""
        return named(self.axes)


def named(axes: Mapping[str, Any]) -> str:
    """`model.path=a.gguf protocol.window=512`."""
    return " ".join(f"{key}={_short(key, value)}" for key, value in axes.items())


def run(points: Sequence[Point], progress: Progress | None) -> RunResult:
    """See `pipeline.evaluate_all`."""
    began_s, clock = time.time(), time.perf_counter()
    common = next((point.settings for point in points if point.settings is not None), None)
    if common is None:
        raise _refused([point for point in points if point.error], len(points))
    with Preflight() as preflight:
        runs = _checked(points, preflight)
        bad = [point for point in points if point.error is not None]
        if any(isinstance(point.error, NotFetched) for point in bad):
            summary = _unfetched(points) | {"wall_s": time.perf_counter() - clock}
            return RunResult(summary, summary["warnings"], common.paths.results, 0)
        if bad and (common.on_bad_point == "refuse" or not runs):
            raise _refused(bad, len(points))
        _check_sort(common.sort, runs)
        warnings = [
            f"{named(axes)} is the same run as {point.name} (run key {_ready(point).spec.run_key}): run once"
            for point in runs
            for axes in point.also
        ]
        summary = _blank(points, runs, warnings)
        if common.dry_run:
            summary |= _planned(runs)
        else:
            for point in runs:
                point.ready = preflight.begin(_ready(point))
            summary |= _computed(runs, points, summary["sweep_key"], progress, began_s)
        summary["points"] += [_told(point) for point in bad]
    summary["points"] = _sorted(summary["points"], common.sort)
    summary |= _verdict(summary["points"])
    problems = [warning for point in summary["points"] for warning in point.get("warnings", ())]
    summary["warnings"] = list(dict.fromkeys(warnings + problems + summary["warnings"]))
    summary["wall_s"] = time.perf_counter() - clock
    return RunResult(summary, summary["warnings"], summary["table"], int(summary["exit_code"]))


def _checked(points: Sequence[Point], preflight: Preflight) -> list[Point]:
    """The distinct runs in the order in which they are computed; bad points get their error."""
    runs: dict[str, Point] = {}
    for point in _ordered(points):
        assert point.settings is not None, "points without settings are not ordered"
        try:
            ready = preflight.check(point.settings)
        except RefusedError as error:
            point.error = error
            continue
        first = runs.setdefault(ready.spec.run_key, point)
        if first is point:
            point.ready = ready
        else:
            first.also.append(point.axes)
    return list(runs.values())


def _ordered(points: Sequence[Point]) -> list[Point]:
    """By model, then engine settings, then data: each in the order in which the grid first names it."""
    rank: dict[str, int] = {}

    def place(point: Point) -> tuple[int, ...]:
        s = point.settings
        return (
            tuple(rank.setdefault(repr(part), len(rank)) for part in (s.model, s.engine, s.data)) if s else ()
        )

    able = [point for point in points if point.settings is not None and point.error is None]
    for point in able:
        place(point)
    return sorted(able, key=place)


def _computed(
    runs: Sequence[Point], points: Sequence[Point], sweep_key: str, progress: Progress | None, began_s: float
) -> dict[str, Any]:
    """Score all runs; returns what the sweep's summary gets from them."""
    settings = _ready(runs[0]).settings
    axes = {key: sorted({str(point.axes[key]) for point in points}) for key in points[0].axes}
    name = f"sweep of {len(runs)} points: {', '.join(axes)}"
    parent = Parent(sweep_key, name, {f"sweep.{key}": ", ".join(values) for key, values in axes.items()})
    scorings = [Scoring(_ready(point), name=point.name) for point in runs]
    tracker = open_tracker(settings.tracking, tracking_folder(settings.paths))
    with Journal(tracker, parent, began_s) as journal:
        perplexity.score(scorings, journal, progress, began_s)
        done = [scoring.summary for scoring in scorings if scoring.summary["ok"]]
        figures = {"n_points": len(runs), "n_points_done": len(done)}
        parent_id, problems = journal.end(figures, complete=len(done) == len(runs))
    return {
        "mlflow_run_id": parent_id,
        "warnings": problems,
        "compile_s": max((scoring.compile_s or 0.0 for scoring in scorings), default=None),
        "load_s": max((scoring.load_s or 0.0 for scoring in scorings), default=None),
        "points": [_told(point, s.summary) for point, s in zip(runs, scorings, strict=True)],
    }


def _planned(runs: Sequence[Point]) -> dict[str, Any]:
    """A dry run's answer: every point with what it takes; nothing is started."""
    ready = [_ready(point) for point in runs]
    common, plans = perplexity.dry_plan(ready, Estimator(ready[0].settings))
    told = [
        _told(point, perplexity.planned(_ready(point)) | {"n_workers": common["n_workers"]} | plan)
        for point, plan in zip(runs, plans, strict=True)
    ]
    return {"dry_run": True, **common, "points": told}


def _unfetched(points: Sequence[Point]) -> dict[str, Any]:
    """A dry run's answer where models would have to be fetched first."""
    missing: dict[str, NotFetched] = {}
    told = []
    for point in points:
        known = {"point": point.axes, "name": point.name, "ok": True, "fetch_bytes": 0}
        if isinstance(point.error, NotFetched):
            missing[str(point.error)] = point.error
            known["fetch_bytes"] = point.error.n_bytes
        elif point.error is not None:
            known |= perplexity.told(point.error)
        told.append(known)
    sizes = [error.n_bytes for error in missing.values()]
    first = next(iter(missing.values()))
    return perplexity.unfetched(first) | {
        "warnings": list(missing),
        "fetch_bytes": None if None in sizes else sum(size or 0 for size in sizes),
        "points": told,
    }


def _blank(points: Sequence[Point], runs: Sequence[Point], warnings: list[str]) -> dict[str, Any]:
    first = _ready(runs[0])
    return {
        **{key: perplexity.blank(first)[key] for key in ("job", "ok", "exit_code", "error", "version")},
        "run_key": None,
        "measure_key": None,
        "numerics": first.subject["numerics"],
        "table": str(folder_of(first.spec.run_dir).parent.parent / "table=runs"),
        "sweep_key": provenance.key_of(sorted(_ready(point).spec.run_key for point in runs)),
        "n_points": len(points),
        "n_runs": len(runs),
        "warnings": warnings,
        "points": [],
    }


def _told(point: Point, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A point in the sweep's summary: its axes, and the summary of its run or why there is none."""
    where = {"point": point.axes, "name": point.name, "also": point.also}
    return where | (dict(summary) if summary is not None else perplexity.told(_error(point)))


def _verdict(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    failed = [point for point in points if not point["ok"]]
    if not failed:
        return {"n_points_done": len(points)}
    lines = [f"{point['name']}: {point['error']['message']}" for point in failed[:_NAMED_AT_MOST]]
    if len(failed) > _NAMED_AT_MOST:
        lines.append(f"and {len(failed) - _NAMED_AT_MOST} more")
    message = f"{len(failed)} of {len(points)} points have no result:\n  " + "\n  ".join(lines)
    hint = "finished points are kept: remove the cause and run the same command again"
    return {
        "ok": False,
        "exit_code": 3,
        "n_points_done": len(points) - len(failed),
        "error": {"type": "IncompleteError", "message": message, "hint": hint},
    }


def _refused(bad: Sequence[Point], n_points: int) -> SettingsError:
    """All points that cannot run, those with one reason together."""
    reasons: dict[str, list[Point]] = {}
    for point in bad:
        reasons.setdefault(str(_error(point)), []).append(point)
    lines = []
    for reason, points in list(reasons.items())[:_NAMED_AT_MOST]:
        more = f" and {len(points) - 1} more" if len(points) > 1 else ""
        lines.append(f"{points[0].name}{more}: {reason}")
    if len(reasons) > _NAMED_AT_MOST:
        lines.append(f"and {len(reasons) - _NAMED_AT_MOST} more reasons")
    hints = list(dict.fromkeys(_error(point).hint for point in bad if _error(point).hint))
    if len(bad) < n_points:
        hints = [*hints[:1], "on_bad_point=skip runs the others"]
    return SettingsError(
        f"{len(bad)} of {n_points} points cannot run:\n  " + "\n  ".join(lines), "; ".join(hints[:2])
    )


def _check_sort(sort: str | None, runs: Sequence[Point]) -> None:
    """Refuse a key that no point will have, before anything is computed."""
    known = [*runs[0].axes, *perplexity.blank(_ready(runs[0]))]
    if sort is not None and sort.lstrip("-+") not in known:
        raise SettingsError(
            f"sort={sort} is no key of a point{nearest(sort.lstrip('-+'), known)}", "-ppl sorts downwards"
        )


def _sorted(points: list[dict[str, Any]], sort: str | None) -> list[dict[str, Any]]:
    """By a key of the points, `-key` falling; points that lack it come last, in the order that they had."""
    if sort is None:
        return points
    key = sort.lstrip("-+")

    def value(point: dict[str, Any]) -> Any:
        return point["point"].get(key, point.get(key))

    known = [point for point in points if value(point) is not None]
    numeric = all(isinstance(value(point), (int, float)) for point in known)
    known.sort(key=lambda point: value(point) if numeric else str(value(point)), reverse=sort.startswith("-"))
    return known + [point for point in points if value(point) is None]


def _ready(point: Point) -> Prepared:
    assert point.ready is not None, "only checked points are run"
    return point.ready


def _error(point: Point) -> PipelineError:
    assert point.error is not None, "only bad points are reported"
    return point.error


def _short(key: str, value: Any) -> str:
    text = str(value)
    return Path(text).name or text if key.rpartition(".")[2] in ("path", "files") else text
