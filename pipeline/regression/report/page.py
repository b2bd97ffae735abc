"""The run as one HTML file: verdict, gates, culprits, rounds of speeds, and the history of every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from pipeline.regression.history import Series, is_followed, moment
from pipeline.regression.outcome import Culprit, Gate, Measured, Outcome
from pipeline.regression.report import charts, words
from pipeline.report import page
from pipeline.report.html import Pictures, cell, grid, legend, lines, note, row, section, side_by_side
from pipeline.report.text import short_paths

MOST_PICTURES = 24
"""Of the history; the sentences below them tell the changes of all figures."""
_KINDS = {"broken": "broken", "not judged": "open", "kept": "kept"}


@dataclass
class Content:
    """What there is to show, and the pictures that the sections drew so far."""

    outcome: Outcome
    history: Sequence[Series]
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def versions(self) -> list[str]:
        """Versions in the history, the oldest first."""
        rows = sorted((row for found in self.history for row in found.rows), key=lambda row: row.finished_at)
        return list(dict.fromkeys(row.version or words.DASH for row in rows))

    def then(self, now: Measured) -> Measured | None:
        """The baseline's measurement of the same."""
        return None if self.outcome.baseline is None else self.outcome.baseline.of(now)


def render(outcome: Outcome, history: Sequence[Series]) -> str:
    """The whole page; the same arguments give the same text."""
    content = Content(outcome, history)
    body = "\n".join(part for part in (make(content) for make in _ORDER) if part)
    style = files("pipeline.regression.report").joinpath("page.css").read_text(encoding="utf-8")
    n_series = max(1, len(content.versions))
    return page.render(words.title(outcome), short_paths(body), content.pictures, n_series, style)


def headline(content: Content) -> str:
    """The verdict and why."""
    outcome = content.outcome
    told = [f"{words.verdict(outcome)} {words.against(outcome)}"]
    told += [found.sentence for found in outcome.culprits if found.sentence]
    told += [f"Warning: {warning}" for warning in outcome.warnings]
    said = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in told)
    known = outcome.provenance
    when = moment(known.get("finished_at"))
    made = [] if when is None else [f"{when:%Y-%m-%d %H:%M} UTC"]
    made += [
        f"{name} {said}"
        for name, said in (
            ("version", words.value(known.get("version"))),
            ("commit", words.commit(known.get("git_sha"))),
        )
        if said != words.DASH
    ]
    return (
        f'<header>\n<h1>{escape(outcome.suite)}<span class="state {escape(outcome.verdict)}">'
        f'{escape(outcome.verdict)}</span></h1>\n<p class="note">{escape(", ".join(made))}</p>\n</header>\n'
        f'<section class="short {escape(outcome.verdict)}" aria-label="In short">\n{said}</section>'
    )


def gates(content: Content) -> str:
    """Every limit, the broken ones first."""
    found = words.sorted_out(content.outcome.gates)
    has_notes = any(gate.note for gates in found.values() for gate in gates)
    columns = _GATE if has_notes else _GATE[:-1]
    rows = [_gate(gate, name, columns) for name, gates in found.items() for gate in gates]
    if not rows:
        return ""
    heads = [(name, name in _TEXTS) for name in columns]
    table = grid(heads, rows, "Every limit with its figures and verdict")
    return section("Limits", f'<div class="gates">{table}</div>')


_GATE = ("check", "of", "metric", "value", "baseline", "change", "limit", "verdict", "note")
_TEXTS = ("check", "of", "metric", "limit", "verdict", "note")


def _gate(gate: Gate, state: str, columns: Sequence[str]) -> str:
    moved = words.change(gate.value, gate.baseline)
    told: list[tuple[str, Any]] = [
        (", ".join(part for part in (gate.variant, gate.data) if part), None),
        (gate.metric, None),
        (words.value(gate.value), gate.value),
        (words.value(gate.baseline), gate.baseline),
        (words.per_cent(moved), moved),
        (gate.limit, None),
        (state, None),
        (gate.note, None),
    ]
    cells = [
        cell(name, said, (said or None) if name in _TEXTS else value, is_text=name in _TEXTS)
        for name, (said, value) in zip(columns[1:], told[: len(columns) - 1], strict=True)
    ]
    return row(gate.name, cells, kind=_KINDS[state])


def culprits(content: Content) -> str:
    """What each broken measurement is narrowed down to."""
    parts = [_culprit(content, found) for found in content.outcome.culprits]
    return section("Why", *parts) if parts else ""


def _culprit(content: Content, found: Culprit) -> str:
    name = words.of(found.name, found.variant, found.data)
    parts = [f"<h3>{escape(name)}</h3>", f"<p>{escape(found.sentence)}</p>"]
    if found.differs:
        rows = [
            row(field, [_plain("baseline", then), _plain("now", now)])
            for field, (then, now) in found.differs.items()
        ]
        heads = [("differs", True), ("baseline", True), ("now", True)]
        parts.append(grid(heads, rows, f"What differs, {name}"))
    if found.layer is not None:
        parts.append(f"<p>{_layer(content, found)}</p>")
    side = [
        _moved(content, found, name),
        _rows("Windows that moved most, nats a token", found.windows, name),
        _rows("Documents that moved most, nats a token", found.documents, name),
    ]
    if any(side):
        parts.append(side_by_side(part for part in side if part))
    if found.tensors:
        named = ", ".join(f"<code>{escape(tensor)}</code>" for tensor in found.tensors)
        parts.append(f"<p>Tensors whose bytes are others: {named}</p>")
    return f'<div class="culprit">{"".join(parts)}</div>'


def _layer(content: Content, found: Culprit) -> str:
    """Where in the network the bits part."""
    now = _measured(content, found)
    outputs = [] if now is None or found.window is None else list(now.layers.get(found.window, {}))
    said = f"Window {found.window}: <code>{escape(str(found.layer))}</code> is the first output that differs"
    if found.layer in outputs:
        before = outputs.index(found.layer)
        said += f"; {before} of {len(outputs)} outputs come before it and have the baseline's bits"
    return f"{said}."


def _moved(content: Content, found: Culprit, name: str) -> str:
    """The picture of all windows, of which the culprit names those that moved most."""
    now = _measured(content, found)
    then = None if now is None else content.then(now)
    if now is None or now.windows is None or then is None or then.windows is None:
        return ""
    named = [int(of["window"]) for of in found.windows]
    spec = charts.moved(then.windows, now.windows, named)
    if spec is None:
        return ""
    caption = "Each window's NLL less the baseline's, nats a token; those that moved most stand out."
    return content.pictures.place(spec, caption, name)


def _measured(content: Content, found: Culprit) -> Measured | None:
    name = (found.name, found.variant, found.data)
    return next((now for now in content.outcome.measured if now.id == name), None)


def _rows(what: str, rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """A table of windows or documents."""
    if not rows:
        return ""
    first, *others = rows[0]
    heads = [(key.replace("_", " "), False) for key in (first, *others)]
    told = [
        row(
            f"{of[first]}",
            [cell(key.replace("_", " "), _figure(key, of[key]), of[key], is_text=False) for key in others],
        )
        for of in rows
    ]
    return f"<div><h3>{escape(what)}</h3>{grid(heads, told, f'{what}, {name}')}</div>"


def _figure(key: str, found: Any) -> str:
    return f"{found:+.4g}" if key.endswith("_diff") else words.value(found)


def _plain(heading: str, found: Any) -> str:
    said = words.value(found)
    return cell(heading, said, said, is_text=True)


def speeds(content: Content) -> str:
    """Each round of the speeds."""
    charted: dict[tuple[str, str], list[Measured]] = {}
    for now in content.outcome.measured:
        for metric in now.samples:
            if is_followed(metric):
                charted.setdefault((now.check, metric), []).append(now)
    parts = []
    for (check, metric), found in charted.items():
        several = len({now.variant for now in found}) > 1
        names = {now.id: f"{now.variant} {now.data}" if several else now.data for now in found}
        spec = charts.samples([(now, content.then(now)) for now in found], metric, names)
        caption = f"{check}: {metric}, each round and the median."
        parts.append(content.pictures.place(spec, caption))
    if not parts:
        return ""
    strokes = [("now", "var(--accent)", "1 0"), ("baseline", "var(--muted)", "1 0")]
    return section("Speeds, round by round", legend(strokes), side_by_side(parts))


def history(content: Content) -> str:
    """Every figure from run to run, its change points marked."""
    shown = _worth(content)
    told = [said for found in content.history for said in words.changes(found)]
    if not shown:
        title = "History"
        return section(title, note("This run is the first that is recorded with these measures."))
    versions = content.versions
    parts = []
    for found in shown[:MOST_PICTURES]:
        check, variant, data, metric, _ = found.id
        first, last = found.rows[0].finished_at, found.rows[-1].finished_at
        caption = f"{words.of(check, variant, data)}: {metric}, {len(found.rows)} runs from "
        caption += f"{first:%Y-%m-%d} to {last:%Y-%m-%d}."
        spec = charts.history(found, versions, _baseline(content, found))
        parts.append(content.pictures.place(spec, caption, " ".join(words.changes(found))))
    strokes = [(f"version {name}", f"var(--s{at})", "1 0") for at, name in enumerate(versions)]
    strokes.append(("change point", "var(--broken)", "6 3"))
    if content.outcome.baseline is not None:
        strokes.append(("baseline", "var(--muted)", "2 3"))
    changes = "".join(f"<li>{escape(said)}</li>" for said in told)
    left = len(shown) - MOST_PICTURES
    return section(
        "History",
        legend(strokes),
        side_by_side(parts),
        note(f"{left} more figures have no picture here.") if left > 0 else "",
        f"<h3 class=after>Changes</h3><ul>{changes}</ul>" if told else note("No change point in any figure."),
    )


def _worth(content: Content) -> list[Series]:
    """Series of today's measures with two runs at least; those with broken limits and changes first."""
    today = {now.id for now in content.outcome.measured}
    broken = {(g.name, g.variant, g.data) for g in content.outcome.gates if g.passed is False}
    last = max((found.rows[-1].finished_at for found in content.history), default=None)
    found = [
        found
        for found in content.history
        if len(found.rows) > 1 and found.id[:3] in today and found.rows[-1].finished_at == last
    ]
    return sorted(found, key=lambda found: (found.id[:3] not in broken, not found.changes))


def _baseline(content: Content, found: Series) -> float | None:
    """What the baseline has of a figure."""
    measured = () if content.outcome.baseline is None else content.outcome.baseline.measured
    return next((of.metrics.get(found.id[3]) for of in measured if of.id == found.id[:3]), None)


def checks(content: Content) -> str:
    """What was measured, and what made the numbers."""
    outcome = content.outcome
    parts = [f"<details><summary>Checks</summary>{lines(outcome.checks.items(), 'inside')}</details>"]
    known = words.provenance(outcome)
    if known:
        has_baseline = outcome.baseline is not None
        heads = [("", True), ("now", True), *([("baseline", True)] if has_baseline else [])]
        rows = [
            row(name, [_plain("now", now), *([_plain("baseline", then)] if has_baseline else [])])
            for name, now, then in known
        ]
        parts.append(grid(heads, rows, "What made these numbers"))
    return section("What made these numbers", *parts)


_ORDER = (headline, gates, culprits, speeds, history, checks)
