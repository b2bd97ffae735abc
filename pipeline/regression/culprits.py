"""Why a gate is red, as far as the baseline's record and today's tell: pure, nothing is measured here.

For each measurement with a broken limit: what differs in model, engine and machine; the windows and documents
that moved most; the first output of the network where the bits of a traced window part (engine.trace), and
the tensors of the model file that are others (engine.tensor_digests). And all that in one sentence.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.regression.judge import differing, figure, shown
from pipeline.regression.outcome import Baseline, Culprit, Gate, Measured, WindowSums
from pipeline.regression.paired import by_cluster

MOST_MOVED = 5
MOST_TENSORS = 20
_ENGINE = ("version", "numerics", "git_sha", "engine_digest")
_MACHINE = ("host", "cpu", "features")
_FEW = 3
"""Tensors that a sentence names."""
_MUCH = 0.25
"""Share of a change from which on a single window is worth a word."""
_FIGURES = {"nll_diff": "ln PPL", "kld_diff": "KL divergence"}
_SAME = 0.03
"""A ceiling that moved by less has not."""


def culprits(
    gates: Sequence[Gate], measured: Sequence[Measured], baseline: Baseline | None, today: Mapping[str, Any]
) -> list[Culprit]:
    """One for every measurement with a broken limit, in the order of the gates.

    Args:
        today: provenance, as `Baseline.provenance`; of it version, numerics, git_sha, engine_digest, host,
            cpu and features are compared.
    """
    broken: dict[tuple[str, str, str], list[Gate]] = {}
    for gate in gates:
        if gate.passed is False:
            broken.setdefault((gate.name, gate.variant, gate.data), []).append(gate)
    by_id = {now.id: now for now in measured}
    found = []
    for name, red in broken.items():
        now = by_id.get(name)
        if now is None:
            found.append(_lost(red))
        else:
            then = None if baseline is None else baseline.of(now)
            found.append(_culprit(red, now, then, {} if baseline is None else baseline.provenance, today))
    return found


def _lost(red: Sequence[Gate]) -> Culprit:
    """Of a measurement that was not made."""
    where = " ".join(filter(None, (red[0].name, red[0].variant, red[0].data)))
    metrics = _metrics(red)
    sentence = f"{where}: {', '.join(metrics)} was not measured, which keeps no limit"
    return Culprit(red[0].name, red[0].variant, red[0].data, metrics, {}, sentence=sentence)


def _culprit(
    red: Sequence[Gate],
    now: Measured,
    then: Measured | None,
    before: Mapping[str, Any],
    today: Mapping[str, Any],
) -> Culprit:
    """Of a measurement and its baseline, if it has one."""
    metrics = _metrics(red)
    if then is None:
        sentence = f"{_where(now)}: {_how_much(red)}; there is no baseline of it to say why"
        return Culprit(now.check, now.variant, now.data, metrics, {}, sentence=sentence)
    known = [field for field in (*_ENGINE, *_MACHINE) if field in before and field in today]
    differs = differing(then.subject, now.subject)
    differs |= differing({name: before[name] for name in known}, {name: today[name] for name in known})
    moved = None if now.job == "throughput" else _moved(then.windows, now.windows, metrics)
    window, layer = _first_apart(then, now)
    tensors = [name for name in differing(then.tensors, now.tensors) if then.tensors and now.tensors]
    about_model = [
        _model(differs, tensors, then, now),
        _subject(differs),
        _engine(differs, then, now, metrics),
    ]
    if not any(about_model):
        about_model = ["model and engine are the same"]
    if now.job == "throughput":
        clauses = [_how_fast(red, then, now), _ceiling(then, now), *about_model, _machine(differs)]
    else:
        clauses = [_how_much(red, moved), *about_model, _parts(window, layer, then, now), _most(moved)]
        if not differs.keys() - set(_MACHINE):
            clauses.append(_machine(differs))
    return Culprit(
        name=now.check,
        variant=now.variant,
        data=now.data,
        metrics=metrics,
        differs=differs,
        windows=[] if moved is None else moved.windows,
        documents=[] if moved is None else moved.documents,
        window=window,
        layer=layer,
        tensors=_at_most(tensors, MOST_TENSORS),
        sentence=f"{_where(now)}: {'; '.join(filter(None, clauses))}",
    )


def _metrics(red: Sequence[Gate]) -> list[str]:
    return list(dict.fromkeys(gate.metric for gate in red))


def _where(now: Measured) -> str:
    """The check, and what tells its measurements apart."""
    return now.check if now.job == "perplexity" else f"{now.check} {now.variant} {now.data}"


@dataclass(frozen=True)
class _Moved:
    """How windows moved since the baseline.

    Attributes:
        figure: "ln PPL" or "KL divergence".
        mean: nats a token, of all.
        n_moved: windows with other bits; at `n_windows`.
        windows, documents: see `Culprit`, and `share`: of the sizes of all windows' (documents') changes.
    """

    figure: str
    mean: float
    n_moved: int
    n_windows: int
    windows: list[dict[str, Any]]
    documents: list[dict[str, Any]]


def _moved(then: WindowSums | None, now: WindowSums | None, metrics: Sequence[str]) -> _Moved | None:
    """The windows and documents that moved most; by their divergences where those alone are to blame."""
    if then is None or now is None or not np.array_equal(then.window, now.window):
        return None
    changes, ranked = {"nll_diff": now.nll_sum - then.nll_sum}, "nll_diff"
    if then.kld_sum is not None and now.kld_sum is not None:
        changes["kld_diff"] = now.kld_sum - then.kld_sum
        if changes["kld_diff"].any() and all(name.startswith("kld") for name in metrics):
            ranked = "kld_diff"
    change, counts = changes[ranked], np.asarray(now.n_scored, np.int64)
    windows = [
        {
            "window": int(now.window[at]),
            "document": int(now.document[at]),
            "first_token": int(now.first_token[at]),
            "n_scored": int(counts[at]),
            **{name: float(each[at] / counts[at]) for name, each in changes.items()},
            "share": share,
        }
        for at, share in _largest(change)
    ]
    names, of_document = np.unique(now.document, return_inverse=True)
    n_windows = np.bincount(of_document)
    sums = {name: by_cluster(of_document, each, counts) for name, each in changes.items()}
    documents = [
        {
            "document": int(names[at]),
            "n_windows": int(n_windows[at]),
            **{name: float(total[at] / tokens[at]) for name, (total, tokens) in sums.items()},
            "share": share,
        }
        for at, share in _largest(sums[ranked][0])
    ]
    mean, n_moved = math.fsum(change.tolist()) / int(counts.sum()), int(np.count_nonzero(change))
    return _Moved(_FIGURES[ranked], mean, n_moved, change.size, windows, documents)


def _largest(change: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
    """Place and share of the entries that changed most, at most `MOST_MOVED`, the largest first."""
    sizes = np.abs(change)
    total = math.fsum(sizes.tolist())
    order = np.argsort(-sizes, kind="stable")[:MOST_MOVED].tolist()
    return [(at, float(sizes[at] / total)) for at in order if sizes[at] > 0]


def _first_apart(then: Measured, now: Measured) -> tuple[int | None, str | None]:
    """The first traced window, and the first output in it, whose bits are others."""
    for window in sorted(then.layers.keys() & now.layers.keys()):
        before = then.layers[window]
        for name, digest in now.layers[window].items():
            if name in before and before[name] != digest:
                return window, name
    return None, None


def _how_much(red: Sequence[Gate], moved: _Moved | None = None) -> str:
    """Which figures broke their limits, and by how much; of bits alone, what they come to."""
    figures = {gate.metric: gate for gate in reversed(red) if not gate.metric.endswith("sha256")}
    if figures:
        return ", ".join(_phrase(figures[name]) for name in _metrics(red) if name in figures)
    if moved is None:
        return f"{' and '.join(gate.metric for gate in red)} changed"
    if not moved.n_moved:
        return "no score changed"
    return (
        f"scores of {moved.n_moved} of {moved.n_windows} windows changed, {moved.figure} by {moved.mean:+.2g}"
    )


def _phrase(gate: Gate) -> str:
    """A figure beside the baseline's, or its limit."""
    value, known = gate.value, gate.baseline
    if not isinstance(value, float | int):
        return f"{gate.metric} is not known"
    if not isinstance(known, float | int):
        return f"{gate.metric} is {value:.5g} (limit {gate.limit})"
    if gate.metric == "ln_ppl":
        return f"ln PPL is {abs(value - known):.2g} {'worse' if value > known else 'better'}"
    change = f"{_change(value / known - 1)}, " if known > 0 else ""
    return f"{gate.metric} is {value:.5g} and was {known:.5g} ({change}limit {gate.limit})"


def _model(
    differs: Mapping[str, tuple[Any, Any]], tensors: Sequence[str], then: Measured, now: Measured
) -> str:
    """Whether the model is another one, and which of its tensors."""
    if "model_sha256" not in differs and not tensors:
        return ""
    said = "the model file is another one"
    if tensors:
        total, verb = (
            len(then.tensors.keys() | now.tensors.keys()),
            "differs" if len(tensors) == 1 else "differ",
        )
        named = ", ".join(_at_most(tensors, _FEW))
        return f"{said}: {len(tensors)} of {total} tensors {verb}, {named}"
    if then.tensors and now.tensors:
        return f"{said}, though all its tensors are the same: its metadata changed"
    return said


def _subject(differs: Mapping[str, tuple[Any, Any]]) -> str:
    """What else of the subject is another."""
    known = (*_ENGINE, *_MACHINE)
    others = {name: pair for name, pair in differs.items() if name not in known and name != "model_sha256"}
    return ", ".join(f"{name} is {shown(b)} and was {shown(a)}" for name, (a, b) in others.items())


def _engine(
    differs: Mapping[str, tuple[Any, Any]], then: Measured, now: Measured, metrics: Sequence[str]
) -> str:
    """What is another about the engine, in as few words as tell it."""
    if "numerics" in differs:
        before, after = differs["numerics"]
        return f"engine.NUMERICS is {after} and was {before}"
    names = [name for name in ("version", "git_sha") if name in differs]
    told = ", ".join(f"{name} {shown(differs[name][1])}, was {shown(differs[name][0])}" for name in names)
    if "engine_digest" not in differs:
        return told
    is_silent = then.subject == now.subject and any(name.endswith("sha256") for name in metrics)
    said = f"the engine's sources are others{f' ({told})' if told else ''}"
    return said + (", engine.NUMERICS was not raised" if is_silent else "")


def _parts(window: int | None, layer: str | None, then: Measured, now: Measured) -> str:
    """Where bits part first, or that in what was traced they do not."""
    if layer is not None:
        return f"first parts at {layer} in window {window}"
    same = sorted(then.layers.keys() & now.layers.keys())
    return f"no output of the traced windows {', '.join(map(str, same))} changed" if same else ""


def _machine(differs: Mapping[str, tuple[Any, Any]]) -> str:
    others = [f"{name} {shown(b)}, was {shown(a)}" for name, (a, b) in differs.items() if name in _MACHINE]
    return f"another machine: {', '.join(others)}" if others else "the same machine"


def _most(moved: _Moved | None) -> str:
    """The window, or document, that makes much of the change, unless it is the only one."""
    if moved is None or moved.n_windows < 2 or not moved.windows:
        return ""
    for kind, parts in (("window", moved.windows), ("document", moved.documents)):
        if len(parts) > 1 and parts[0]["share"] >= _MUCH:
            return f"{kind} {parts[0][kind]} explains {_percent(parts[0]['share'])} of it"
    return f"no window explains more than {_percent(moved.windows[0]['share'])} of it"


def _how_fast(red: Sequence[Gate], then: Measured, now: Measured) -> str:
    """Which shares and ratios fell, and tokens a second beside them."""
    said = _how_much(red)
    before, after = figure(then, "tok_per_s"), figure(now, "tok_per_s")
    if before and after and "tok_per_s" not in _metrics(red):
        said += f", {after:.4g} tokens a second and {before:.4g} then ({_change(after / before - 1)})"
    return said


def _ceiling(then: Measured, now: Measured) -> str:
    """Whether the machine itself does less, and by more than from round to round."""
    for share, what in (("fma_share", "arithmetic"), ("read_share", "memory")):
        before, after = _ceilings(then, share), _ceilings(now, share)
        if before and after:
            change = statistics.median(after) / statistics.median(before) - 1
            if abs(change) <= _SAME:
                moved = "did not move"
            elif max(min(before), min(after)) <= min(max(before), max(after)):
                moved = "did not move by more than between rounds"
            else:
                moved = f"moved too ({_change(change)})"
            return f"the machine's ceiling of {what} {moved}"
    return ""


def _ceilings(measured: Measured, share: str) -> list[float]:
    """Of each round, in proportion to it: tokens a second over their share of it."""
    pairs: list[tuple[float | None, float | None]]
    rounds = measured.samples
    if "tok_per_s" in rounds and share in rounds:
        pairs = list(zip(rounds["tok_per_s"], rounds[share], strict=True))
    else:
        pairs = [(figure(measured, "tok_per_s"), figure(measured, share))]
    return [speed / part for speed, part in pairs if speed and part]


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def _change(share: float) -> str:
    return f"{share * 100:+.{0 if abs(share) >= 0.1 else 2}f} %"


def _at_most(names: Sequence[str], most: int) -> list[str]:
    """So many names, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return [*names[:most], *more]
