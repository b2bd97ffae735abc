"""What is said of a regression run: its verdict, its gates, what made it, and the changes of its history."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.regression.history import Row, Series, moment
from pipeline.regression.outcome import Gate, Outcome
from pipeline.report.text import flat

DASH = "-"
STATES = ("broken", "not judged", "kept")
"""Of a gate, the most urgent first."""
_DIGEST = re.compile(r"[0-9a-f]{40,}")


def state(gate: Gate) -> str:
    """One of `STATES`."""
    return {False: "broken", None: "not judged", True: "kept"}[gate.passed]


def sorted_out(gates: Iterable[Gate]) -> dict[str, list[Gate]]:
    """Gates by their state, each in the order that they have."""
    found: dict[str, list[Gate]] = {name: [] for name in STATES}
    for gate in gates:
        found[state(gate)].append(gate)
    return found


def title(outcome: Outcome) -> str:
    """The suite and the verdict."""
    return f"{outcome.suite}: {outcome.verdict}"


def verdict(outcome: Outcome) -> str:
    """The verdict in a sentence or two."""
    n = {name: len(gates) for name, gates in sorted_out(outcome.gates).items()}
    total = len(outcome.gates)
    parts = []
    if n["broken"]:
        parts.append(f"{n['broken']} of {_limits(total)} {'is' if n['broken'] == 1 else 'are'} broken.")
    elif n["kept"]:
        all_of = "All" if n["kept"] == total else f"{n['kept']} of"
        parts.append(f"{all_of} {_limits(total)} {'is' if total == 1 else 'are'} kept.")
    elif not total:
        parts.append("No limit was judged.")
    if n["not judged"]:
        parts.append(f"{n['not judged']} could not be judged.")
    if outcome.verdict == "incomplete":
        parts.insert(0, "Not everything could be measured.")
    if outcome.verdict == "promoted":
        parts.insert(0, "This run is the baseline from now on.")
    return " ".join(parts)


def against(outcome: Outcome) -> str:
    """The baseline, and when it was made."""
    if outcome.baseline is None:
        return "Without a baseline."
    told = outcome.baseline.provenance
    made = [said for said in (value(told.get("version")), commit(told.get("git_sha"))) if said != DASH]
    when = moment(told.get("finished_at"))
    if when is not None:
        made.insert(0, f"{when:%Y-%m-%d %H:%M} UTC")
    told_of = f" ({', '.join(made)})" if made else ""
    return f"Against baseline {outcome.baseline.name}{told_of}."


def commit(sha: str | None) -> str:
    """The beginning of a commit's name."""
    return (sha or DASH)[:10]


def value(found: Any) -> str:
    """A figure with six digits, the beginning of a digest, anything else as it is; a dash for nothing."""
    if found is None or found == "" or (isinstance(found, float) and not math.isfinite(found)):
        return DASH
    if isinstance(found, float):
        return f"{found:,.6g}" if abs(found) < 1e6 else f"{found:,.0f}"
    if isinstance(found, (list, tuple)):
        return ", ".join(map(str, found))
    text = str(found)
    return f"{text[:12]}…" if _DIGEST.fullmatch(text) else text


def change(now: Any, then: Any) -> float | None:
    """How far a figure is from the baseline's, as a fraction of it; None where that says nothing."""
    known = [x for x in (now, then) if isinstance(x, (int, float)) and math.isfinite(x)]
    return now / then - 1 if len(known) == 2 and then else None


def per_cent(fraction: float | None) -> str:
    """`+0.21 %`: two digits below ten."""
    if fraction is None:
        return DASH
    size = abs(100 * fraction)
    if size == 0:
        return "0 %"
    places = 0 if size >= 9.95 else min(1 - math.floor(math.log10(size)), 12)
    return f"{100 * fraction:+,.{places}f} %"


def of(check: str, variant: str, data: str) -> str:
    """A measurement in words."""
    where = f"{variant} on {data}" if variant and data else variant or data
    return f"{check}: {where}" if where else check


def provenance(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Label, this run's value and the baseline's, of all that is known."""
    now = dict(flat(_readable(outcome.provenance)))
    then = {} if outcome.baseline is None else dict(flat(_readable(outcome.baseline.provenance)))
    return [(name, now.get(name, DASH), then.get(name, DASH)) for name in dict.fromkeys([*now, *then])]


_MADE = (
    "version", "numerics", "git_sha", "engine_digest", "host", "cpu", "features", "versions", "wall_s",
)  # fmt: skip


def _readable(told: Mapping[str, Any]) -> dict[str, Any]:
    """What made the numbers, of all that is recorded of a run."""
    when = moment(told.get("finished_at"))
    known = {} if when is None else {"finished at": f"{when:%Y-%m-%d %H:%M:%S} UTC"}
    return known | {name.replace("_", " "): told[name] for name in _MADE if name in told}


def changes(found: Series) -> list[str]:
    """A sentence for each change point of a figure, the latest first."""
    return [_change(found, at) for at in reversed(found.changes)]


def _change(found: Series, at: int) -> str:
    before, after = found.rows[at - 1], found.rows[at]
    low, high = float(found.levels[at - 1]), float(found.levels[at])
    moved = change(high, low)
    sign = "" if moved is None else f" ({per_cent(moved)})"
    named = [
        f"{what} {a} → {b}"
        for what, a, b in zip(_FIELDS, _fields(before), _fields(after), strict=True)
        if a != b
    ]
    why = f" with {', '.join(named)}" if named else ", with the same version, commit and processor"
    check, variant, data, metric, _ = found.id
    return f"{of(check, variant, data)}: {metric} {low:.6g} → {high:.6g}{sign} on {_day(after)}{why}."


_FIELDS = ("version", "NUMERICS", "commit", "processor")


def _fields(row: Row) -> tuple[str, ...]:
    return value(row.version), value(row.numerics), commit(row.git_sha), value(row.cpu)


def _day(row: Row) -> str:
    return f"{row.finished_at:%Y-%m-%d}"


def _limits(n: int) -> str:
    return f"{n:,} limit{'' if n == 1 else 's'}"


def listed(texts: Sequence[str], most: int) -> list[str]:
    """The first texts, and how many more there are."""
    more = len(texts) - most
    return list(texts) if more <= 0 else [*texts[:most], f"and {more:,} more"]
