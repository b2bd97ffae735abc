"""Limits against what was measured: which are kept, which are broken, and which could not be judged.

    at_most, at_least   today's figure alone; one that is not known keeps no limit
    rise, fall          today's against the baseline's; of a speed, the medians of the rounds
    effect              the paired difference by window (paired.py): broken when its interval lies above 0 and
                        its mean is `effect` at least; where neither that nor its absence can be seen, it is
                        kept, and the note says how many windows it would take
    equal               bits: of scores only where measure and subject are the baseline's; of a file always

What the baseline does not have cannot be judged against it, nor a peer that did not run: `Gate.passed` is
None, and the note says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import SettingsError
from pipeline.regression.limits import Limit, in_force
from pipeline.regression.outcome import Baseline, Gate, Measured
from pipeline.regression.paired import SUMS, paired

_ABSOLUTE = ("at_most", "at_least")
_OF_FILES = ("model_sha256",)
"""Digests that do not follow from measure and subject."""
_WORDS = {
    "data_sha256": "the text is another one",
    "data_documents": "documents are kept apart in one of them",
    "data_weights_sha256": "documents have other weights",
    "protocol_limit": "another part of the text",
    "protocol_version": "the protocol was changed",
}
_HINT = (
    "numbers of different measures are never compared: put back what changed, or promote a run of this suite "
    "as a baseline of its own (action=promote)"
)


def judge(
    limits: Mapping[str, Sequence[Limit]],
    measured: Sequence[Measured],
    baseline: Baseline | None,
    engines: tuple[str | None, str | None],
) -> list[Gate]:
    """A gate for every limit of every measurement, in their order; then what was not measured.

    Args:
        limits: by check.
        measured: of the same measures as the baseline's, see `require_same_measures`.
        engines: digests of the engine's sources, the baseline's and today's.
    """
    gates = []
    for now in measured:
        then = None if baseline is None else baseline.of(now)
        for limit in in_force(limits.get(now.check, ()), _test(now)):
            gates.append(_judged(limit, now, then, baseline is not None, engines))
    return gates + _missing(limits, measured, baseline)


def require_same_measures(
    measures: Iterable[Measured | tuple[tuple[str, str, str], Mapping[str, Any]]], baseline: Baseline
) -> None:
    """That whatever the baseline has too was asked the same (contract.md 1).

    Args:
        measures: what was measured, or before that id and measure of what will be.

    Raises:
        SettingsError: kind OtherMeasure; names each check, field and both values.
    """
    by_id = {then.id: then for then in baseline.measured}
    problems: dict[str, None] = {}
    for each in measures:
        now = each if isinstance(each, Measured) else None
        name, measure = (each.id, each.measure) if isinstance(each, Measured) else each
        then = by_id.get(name)
        if then is None:
            continue
        fields = differing(then.measure, measure)
        found = [_another(field, *values, fields) for field, values in fields.items()]
        if now is not None:
            found += _other_windows(then, now)
        problems |= dict.fromkeys(f"{name[0]}: {sentence}" for sentence in found)
    if problems:
        message = f"another measure than that of the baseline {baseline.name}: {'; '.join(problems)}"
        raise SettingsError(message, _HINT, kind="OtherMeasure")


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields with other values -> (then's, now's), None where one has no such field."""
    names = dict.fromkeys([*then, *now])
    pairs = {name: (then.get(name), now.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def shown(value: Any) -> str:
    """A value for a person: of a digest the beginning."""
    if value is None:
        return "none"
    text = str(value)
    return f"{text[:12]}..." if len(text) >= 40 and " " not in text else text


def figure(measured: Measured, metric: str) -> float | None:
    """A figure, of a speed the median of its rounds; None where it is not known."""
    rounds = measured.samples.get(metric)
    value = statistics.median(rounds) if rounds else measured.metrics.get(metric)
    return None if value is None or not math.isfinite(value) else value


def _test(measured: Measured) -> str | None:
    return measured.data if measured.job == "throughput" else None


def _judged(
    limit: Limit,
    now: Measured,
    then: Measured | None,
    has_baseline: bool,
    engines: tuple[str | None, str | None],
) -> Gate:
    """The gate of a limit of a measurement."""
    kept: tuple[float | str | None, float | str | None, bool | None, str]
    if limit.kind == "equal":
        kept = _equal(limit.name, now, then, engines)
    elif limit.kind == "effect":
        kept = _effect(limit, now, then)
    else:
        kept = _bounded(limit, now, then)
    value, known, passed, note = kept
    if then is None and passed is None and not note:
        note = "new since the baseline" if has_baseline else "there is no baseline"
    return Gate(now.check, now.variant, now.data, limit.name, value, known, str(limit), passed, note)


def _bounded(
    limit: Limit, now: Measured, then: Measured | None
) -> tuple[float | None, float | None, bool | None, str]:
    """Value, baseline's, verdict and note of a figure with a bound."""
    value, known = figure(now, limit.name), None if then is None else figure(then, limit.name)
    if value is None:
        if limit.name.startswith("ratio/"):
            return value, known, None, f"{limit.name.removeprefix('ratio/')} did not run"
        if limit.kind in _ABSOLUTE or known is not None:
            return value, known, False, "its value is not known, which keeps no limit"
        return value, known, None, "" if then is None else "neither the baseline nor this run has it"
    if limit.kind == "at_most":
        return value, known, value <= limit.bound, ""
    if limit.kind == "at_least":
        return value, known, value >= limit.bound, ""
    if known is None:
        return value, known, None, "" if then is None else "the baseline does not have it"
    room = limit.bound * abs(known)
    return value, known, value <= known + room if limit.kind == "rise" else value >= known - room, ""


def _effect(
    limit: Limit, now: Measured, then: Measured | None
) -> tuple[float | None, float | None, bool | None, str]:
    """The same of a paired difference."""
    sums = SUMS[limit.name]
    if now.windows is None or getattr(now.windows, sums) is None:
        return None, None, False, "its windows are not known, which keeps no limit"
    if then is None or then.windows is None or getattr(then.windows, sums) is None:
        counts = float(now.windows.n_scored.sum())
        mean = math.fsum(getattr(now.windows, sums).tolist()) / counts
        return mean, None, None, "" if then is None else "the baseline has no such windows"
    if not np.isfinite(getattr(now.windows, sums)).all():
        return None, figure(then, limit.name), False, "its value is not known, which keeps no limit"
    found = paired(then.windows, now.windows, limit.name, limit.confidence)
    note = str(found) if found.mean or found.stderr else ""
    if found.is_open(limit.bound):
        needed = found.windows_needed(limit.bound)
        note += f"; too few to tell a rise by {limit.bound:g}, which takes "
        note += "more windows" if needed is None else f"about {max(needed, found.n_windows + 1):,} windows"
    elif found.low is not None and found.low > 0 and found.mean < limit.bound:
        note += f"; it rose, by less than the {limit.bound:g} that matters"
    return found.value, found.baseline, not found.is_worse(limit.bound), note


def _equal(
    name: str, now: Measured, then: Measured | None, engines: tuple[str | None, str | None]
) -> tuple[str | None, str | None, bool | None, str]:
    """The same of a digest."""
    value, known = now.bits.get(name), None if then is None else then.bits.get(name)
    if then is None or known is None:
        return value, known, None, "" if then is None else "the baseline does not have it"
    if value is None:
        return value, known, False, "its value is not known, which keeps no limit"
    if name in _OF_FILES:
        return value, known, value == known, "" if value == known else "the model file is another one"
    others = differing(then.subject, now.subject)
    if others:
        told = ", ".join(f"{field} {shown(a)}, now {shown(b)}" for field, (a, b) in others.items())
        return value, known, None, f"bits are of one subject, and this is another: {told}"
    if value == known:
        return value, known, True, ""
    if engines[0] is not None and engines[0] == engines[1]:
        why = "and the engine's sources are the same: look at the machine, or at the compiler's version"
    else:
        why = "although engine.NUMERICS was not raised"
    return value, known, False, f"bits of the same subject changed {why}"


def _missing(
    limits: Mapping[str, Sequence[Limit]], measured: Sequence[Measured], baseline: Baseline | None
) -> list[Gate]:
    """Gates of what only the baseline has, and of checks and tests that have limits and no measurement."""
    ids, checks = {now.id for now in measured}, {now.check for now in measured}
    named = {(now.check, _test(now)) for now in measured}
    gates: list[Gate] = []

    def add(at: tuple[str, str, str], limit: Limit, known: float | str | None, why: str, lost: bool) -> None:
        passed = False if lost and limit.kind in _ABSOLUTE else None
        gates.append(Gate(*at, limit.name, None, known, str(limit), passed, why))

    for then in () if baseline is None else baseline.measured:
        if then.check in limits and then.id not in ids:
            named.add((then.check, _test(then)))
            for limit in in_force(limits[then.check], _test(then)):
                known = then.bits.get(limit.name) if limit.kind == "equal" else figure(then, limit.name)
                why = "only the baseline has it: it was not measured today"
                add(then.id, limit, known, why, then.check not in checks)
    for check, bounds in limits.items():
        has_any = any(name == check for name, _ in named)
        for limit in bounds:
            if not has_any or (limit.test is not None and (check, limit.test) not in named):
                add((check, "", limit.test or ""), limit, None, "it was not measured", True)
    return gates


def _another(field: str, then: Any, now: Any, fields: Mapping[str, Any]) -> str:
    """A field of the measure, both values, and what that means."""
    said = f"{field} {shown(then)} in the baseline, {shown(now)} now"
    if field == "tokens_sha256":
        return f"{said}: " + ("as its text is" if "data_sha256" in fields else "another tokenizer")
    return f"{said}: {_WORDS[field]}" if field in _WORDS else said


def _other_windows(then: Measured, now: Measured) -> list[str]:
    """How the windows of two measurements differ, beside their measures."""
    a, b = then.windows, now.windows
    if a is None or b is None:
        return []
    if not np.array_equal(a.window, b.window):
        lost, more = np.setdiff1d(a.window, b.window).tolist(), np.setdiff1d(b.window, a.window).tolist()
        named = f": {_windows(lost)} missing" if lost else f": {_windows(more)} new" if more else ""
        return [f"n_windows {a.window.size} in the baseline, {b.window.size} now{named}"]
    for name in ("n_scored", "first_token", "document"):
        mine, other = getattr(b, name), getattr(a, name)
        if not np.array_equal(mine, other):
            at = int(np.flatnonzero(mine != other)[0])
            return [
                f"{name} of window {int(a.window[at])} {int(other[at])} in the baseline, {int(mine[at])} now"
            ]
    return []


def _windows(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"window {ranks[0]} is"
    more = f" and {len(ranks) - 5} more" if len(ranks) > 5 else ""
    return f"windows {', '.join(map(str, ranks[:5]))}{more} are"
