"""The run as GitHub's Markdown, for a pull request: the verdict first, what is kept folded away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pipeline.regression.history import Series
from pipeline.regression.outcome import Culprit, Gate, Outcome
from pipeline.regression.report import words
from pipeline.report.text import markdown_cell, short_paths

MOST_CHARACTERS = 60_000
"""GitHub takes 65,536 of a comment."""
_ROWS = (1_000, 200, 50, 20, 8, 3)
"""Rows of a table, entries of a list: as many as there is room for."""
_LONGEST = 400
"""Characters of a cell or an entry."""


def document(outcome: Outcome, history: Sequence[Series]) -> str:
    """The whole text, at most `MOST_CHARACTERS`; what had no room is counted."""
    for most in _ROWS:
        text = _document(outcome, history, most)
        if len(text) <= MOST_CHARACTERS:
            break
    return text


def _document(outcome: Outcome, history: Sequence[Series], most: int) -> str:
    gates = words.sorted_out(outcome.gates)
    broken, open_, kept = (gates[name] for name in words.STATES)
    told = [said for found in history for said in words.changes(found)]
    checks = [f"{name}: {said}" for name, said in outcome.checks.items()]
    parts = [
        f"## {_cell(words.title(outcome))}",
        f"**{_cell(words.verdict(outcome))}** {_cell(words.against(outcome))}",
        _gates(broken, most),
        _list([culprit.sentence for culprit in outcome.culprits], most),
        *(_culprit(culprit, most) for culprit in outcome.culprits[:most]),
        _list([f"Warning: {warning}" for warning in outcome.warnings], most),
        _folded(f"{_n(open_, 'limit')} could not be judged", _gates(open_, most)),
        _folded(f"{_n(kept, 'limit')} kept", _gates(kept, most)),
        _folded(f"{_n(told, 'change')} in the history", _list(told, most)),
        _folded("What was measured", _list(checks, most)),
        _folded("What made these numbers", _provenance(outcome)),
    ]
    return short_paths("\n\n".join(part for part in parts if part)) + "\n"


def _gates(gates: Sequence[Gate], most: int) -> str:
    """A table of gates; columns that say nothing of any of them are left out."""
    if not gates:
        return ""
    rows = [
        {
            "check": gate.name,
            "variant": gate.variant,
            "data": gate.data,
            "metric": gate.metric,
            "value": words.value(gate.value),
            "baseline": words.value(gate.baseline),
            "change": words.per_cent(words.change(gate.value, gate.baseline)),
            "limit": gate.limit,
            "note": gate.note,
        }
        for gate in gates[:most]
    ]
    names = [name for name in rows[0] if any(row[name] not in ("", words.DASH) for row in rows)]
    table = _table(names, [[row[name] for name in names] for row in rows])
    return table + _more(gates, most)


def _culprit(culprit: Culprit, most: int) -> str:
    """What the sentence of a culprit rests on, folded."""
    parts = [
        _rows("Windows that moved most", culprit.windows, most),
        _rows("Documents that moved most", culprit.documents, most),
    ]
    if culprit.differs:
        cells = [[name, words.value(then), words.value(now)] for name, (then, now) in culprit.differs.items()]
        parts.insert(0, _table(["differs", "baseline", "now"], cells))
    if culprit.tensors:
        named = words.listed([_cell(name) for name in culprit.tensors], most)
        parts.append(f"Tensors whose bytes are others: {', '.join(named)}")
    inside = "\n\n".join(part for part in parts if part)
    return _folded(words.of(culprit.name, culprit.variant, culprit.data), inside)


def _rows(what: str, rows: Sequence[Mapping[str, Any]], most: int) -> str:
    if not rows:
        return ""
    names = list(rows[0])
    table = _table(
        [name.replace("_", " ") for name in names],
        [[_figure(name, row[name]) for name in names] for row in rows[:most]],
    )
    return f"{what}:\n\n{table}{_more(rows, most)}"


def _figure(name: str, found: Any) -> str:
    return f"{found:+.4g}" if name.endswith("_diff") else words.value(found)


def _provenance(outcome: Outcome) -> str:
    rows = words.provenance(outcome)
    if outcome.baseline is None:
        return _table(["", "now"], [row[:2] for row in rows]) if rows else ""
    return _table(["", "now", "baseline"], rows)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = [":--" if name in _TEXTS else "--:" for name in names]
    head = [_cell(name) for name in names]
    lines = [head, ruler, *([_cell(found) for found in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_TEXTS = ("", "check", "variant", "data", "metric", "limit", "note", "differs", "baseline", "now", "document")


def _list(texts: Sequence[str], most: int) -> str:
    return "\n".join(f"- {_cell(text)}" for text in words.listed([t for t in texts if t], most))


def _more(entries: Sequence[Any], most: int) -> str:
    return f"\n\n… and {len(entries) - most:,} more." if len(entries) > most else ""


def _folded(summary: str, inside: str) -> str:
    """Empty for nothing; Markdown inside HTML wants empty lines around it."""
    if not inside:
        return ""
    return f"<details><summary>{escape(_cut(summary), quote=False)}</summary>\n\n{inside}\n\n</details>"


def _cell(text: str) -> str:
    return markdown_cell(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _n(entries: Sequence[Any], noun: str) -> str:
    return f"{len(entries):,} {noun}{'' if len(entries) == 1 else 's'}"
