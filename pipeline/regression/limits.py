"""What the figures of a check have to keep, as a suite's file says it.

    ppl: {at_most: 20, rise: 0.002}              absolute, also '<=20'; at most 0.2 % above the baseline
    ln_ppl: {effect: 0.005, confidence: 0.99}    windows paired with the baseline's; smaller effects are none
    nll_sha256: {equal: true}                    the baseline's bits
    fma_share: {fall: 0.15}                      of every test of a throughput check; `fma_share/tg64`: of one
    ratio/llama_cpp: {fall: 15 %}                to a peer in the same rounds

Every problem of a check's limits is told at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.bench.players import ENGINES
from pipeline.compare.settings import FIGURES, LIMITED

JOBS = ("perplexity", "compare", "throughput")
KINDS = ("at_most", "at_least", "rise", "fall", "effect", "equal")
DIGESTS = {
    "perplexity": ("nll_sha256", "model_sha256"),
    "compare": ("nll_sha256", "kld_sha256", "model_sha256"),
    "throughput": ("model_sha256",),
}
PAIRED = {"perplexity": ("ln_ppl",), "compare": ("ln_ppl", "kld_mean"), "throughput": ()}
"""What windows are paired for: ln_ppl is the mean negative log-likelihood of a token, nats."""
SPEEDS = ("tok_per_s", "fma_share", "read_share", "ratio")
PRODUCED = {
    "perplexity": (
        *("ppl", "ppl_stderr", "ppl_stderr_clustered", "nll_mean_nats", "bits_per_byte", "byte_ppl"),
        *("word_ppl", "half_ppl", "half_ppl_stderr", "half_ppl_stderr_clustered", "half_nll_mean_nats"),
    ),
    "compare": LIMITED,
    "throughput": SPEEDS,
}
"""Figures of each job, beside its digests and what is paired."""

_MORE_IS_BETTER = ("same_top", "corr", *SPEEDS)
_SIGNED = tuple(
    name
    for name in FIGURES
    if name.startswith(("ln_ratio", "smallest_", "ppl_diff", "dp_", "kld_min", "kld_p0"))
    and "stderr" not in name
    and not name.startswith("dp_rms")
)
_RELATIVE, _ABSOLUTE = ("rise", "fall"), ("at_most", "at_least")
_LIMIT = re.compile(r"\s*(<=|>=|<|>)?\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_PERCENT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*%\s*")
_EXAMPLE = "expected for example {at_most: 20}, {rise: 0.002}, {equal: true} or '<=20'"


@dataclass(frozen=True)
class Limit:
    """A bound of one figure or digest of a check.

    Attributes:
        metric: as the suite has it, such as ppl, fma_share/ppl512, ratio/llama_cpp, ratio/llama_cpp/tg64.
        kind: one of `KINDS`.
        bound: of `rise` and `fall` a fraction of the baseline's; of `effect` in the metric's unit; of `equal`
            1.
        confidence: of `effect`, of the two-sided interval.
    """

    metric: str
    kind: str
    bound: float
    confidence: float = 0.95

    @property
    def name(self) -> str:
        """The metric as measurements have it, without a test."""
        parts = self.metric.split("/")
        return "/".join(parts[: 2 if parts[0] == "ratio" else 1])

    @property
    def test(self) -> str | None:
        """The test of a throughput check that it is for; None: all."""
        return self.metric.removeprefix(self.name).removeprefix("/") or None

    def __str__(self) -> str:
        return {
            "at_most": f"<= {self.bound:g}",
            "at_least": f">= {self.bound:g}",
            "rise": f"<= {1 + self.bound:g} x baseline",
            "fall": f">= {1 - self.bound:g} x baseline",
            "effect": f"no rise by {self.bound:g} or more ({self.confidence * 100:g} % confidence)",
            "equal": "= baseline",
        }[self.kind]


def in_force(limits: Iterable[Limit], test: str | None = None) -> list[Limit]:
    """The limits that count for a measurement: what is said of its test stands in for what is said of all.

    Args:
        test: of a throughput check, as `Measured.data` has it; None for other jobs.
    """
    known = list(limits)
    own = {(limit.name, limit.kind) for limit in known if limit.test is not None and limit.test == test}
    return [
        limit
        for limit in known
        if limit.test == test or (limit.test is None and (limit.name, limit.kind) not in own)
    ]


def limits_of(
    check: str, job: str, told: Mapping[str, Any], *, tests: Sequence[str] = (), peers: Sequence[str] = ()
) -> tuple[tuple[Limit, ...], list[str]]:
    """A check's limits as read, and a sentence for each problem.

    Args:
        told: metric -> {kind: bound}, or a number with or without a comparison.
        tests: of a throughput check, that it runs.
        peers: that run beside the engine there.
    """
    found: list[Limit] = []
    problems: list[str] = []
    written: dict[str, str] = {}
    for given, bounds in told.items():
        metric = re.sub(r"\s+", "", str(given)).lower()
        where = f"{check}: limits.{given}"
        if metric in written:
            problems.append(f"{where} and limits.{written[metric]} are one metric; say it once")
            continue
        written[metric] = str(given)
        if problem := _unknown(metric, job, tests, peers):
            problems.append(f"{where} {problem}")
            continue
        limits, wrong = _read(metric, job, bounds)
        found += limits
        problems += [f"{where}: {sentence}" for sentence in wrong]
    problems += [f"{check}: {sentence}" for sentence in _conflicts(found)]
    return tuple(found), problems


def _unknown(metric: str, job: str, tests: Sequence[str], peers: Sequence[str]) -> str:
    """Why a check of this job has no such metric; "" when it has."""
    name, *rest = metric.split("/")
    known = (*PRODUCED[job], *DIGESTS[job], *PAIRED[job])
    if name not in known:
        makers = [other for other in JOBS if name in (*PRODUCED[other], *DIGESTS[other], *PAIRED[other])]
        if makers:
            return f"is not known: a {job} check has no {name}, {' and '.join(makers)} has it"
        return f"is not known{_meant(name, known)}"
    if name == "ratio":
        if not rest:
            return "names no peer; expected ratio/PEER, or ratio/PEER/TEST"
        peer, *rest = rest
        if peer not in peers:
            if peer in ENGINES[1:]:
                return f"is not known: {peer} does not run; add it to this check's peer=[...]"
            return f"is not known{_meant(peer, peers or ENGINES[1:])}"
    if rest and (job != "throughput" or name in DIGESTS[job]):
        return f"is not known; expected {name} alone"
    if rest and "/".join(rest) not in tests:
        return f"is not known: there is no such test{_meant('/'.join(rest), tests)}"
    return ""


def _meant(word: str, known: Sequence[str]) -> str:
    """'; did you mean X? (known: ...)', names of many parts matched by their likeness alone."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]}?" if close else "") + f" (known: {', '.join(known)})"


def _read(metric: str, job: str, told: Any) -> tuple[list[Limit], list[str]]:
    """The limits of one metric, and what is wrong with them."""
    if not isinstance(told, Mapping):
        return _scalar(metric, job, told)
    bounds = {str(kind): bound for kind, bound in told.items()}
    confidence, problems = 0.95, []
    if "confidence" in bounds:
        value = _number(bounds.pop("confidence"))
        if "effect" not in bounds:
            problems.append(
                "confidence without effect says nothing; expected {effect: 0.005, confidence: 0.99}"
            )
        elif value is None or not 0.5 <= value < 1:
            problems.append(f"confidence: {told['confidence']} is none; expected 0.5 to under 1, as 0.99")
        else:
            confidence = value
    if not bounds and not problems:
        problems.append(f"says nothing; {_EXAMPLE}")
    found = []
    for kind, bound in bounds.items():
        if kind not in KINDS:
            problems.append(f"{kind} is no kind of limit{_meant(kind, (*KINDS, 'confidence'))}")
        elif problem := _misfit(metric, job, kind) or _no_bound(kind, bound):
            problems.append(problem)
        else:
            value = 1.0 if kind == "equal" else _number(bound)
            assert value is not None, "what is no number was refused"
            found.append(Limit(metric, kind, value, confidence if kind == "effect" else 0.95))
    return found, problems


def _scalar(metric: str, job: str, told: Any) -> tuple[list[Limit], list[str]]:
    """A number, the worst value allowed, or one with a comparison, as the limits of `compare` are told."""
    match = None if isinstance(told, bool) else _LIMIT.fullmatch(str(told))
    if match is None:
        return [], [f"{told} is no limit; {_EXAMPLE}"]
    sign, number = match.groups()
    if sign in ("<", ">"):
        return [], [f"{told}: bounds are kept by what is equal to them; write '{sign}={number}'"]
    usual = "at_least" if metric.partition("/")[0] in _MORE_IS_BETTER else "at_most"
    kind = {"<=": "at_most", ">=": "at_least"}.get(sign or "", usual)
    problem = _misfit(metric, job, kind)
    return ([], [problem]) if problem else ([Limit(metric, kind, float(number))], [])


def _misfit(metric: str, job: str, kind: str) -> str:
    """Why a metric cannot have that kind of limit; "" when it can."""
    name = metric.partition("/")[0]
    if name in DIGESTS[job]:
        return "" if kind == "equal" else f"{kind} of a digest says nothing; expected {{equal: true}}"
    if kind == "equal":
        return f"equal is for digests ({', '.join(DIGESTS[job])}); figures may be at_most, or rise, fall"
    if kind == "effect" and name not in PAIRED[job]:
        return f"effect needs sums by window; of {job} that is {' and '.join(PAIRED[job]) or 'nothing'}"
    if name == "ln_ppl" and kind != "effect":
        return f"{kind} is for ppl or nll_mean_nats; ln_ppl is what windows are paired for: {{effect: 0.005}}"
    if kind in _RELATIVE and name in _SIGNED:
        return f"{kind} is a fraction of the baseline's, and {name} may be on either side of 0; use at_most"
    wrong = "rise" if name in _MORE_IS_BETTER else "fall"
    if kind == wrong:
        right = _RELATIVE[1 - _RELATIVE.index(wrong)]
        better = "more" if wrong == "rise" else "less"
        return f"{kind} would miss it getting worse, for {better} of {name} is better; expected {right}"
    return ""


def _no_bound(kind: str, told: Any) -> str:
    """Why a value is no bound of this kind; "" when it is one."""
    if kind == "equal":
        return "" if told is True else f"equal: {told} says nothing; expected equal: true, or leave it out"
    value = _number(told)
    if value is None:
        return f"{kind}: {told} is no number; {_EXAMPLE}"
    if kind in _RELATIVE and not 0 <= value <= 1:
        return f"{kind}: {told} is no fraction from 0 to 1; 15 % is 0.15"
    if kind == "effect" and value <= 0:
        return f"effect: {told} is none; expected the smallest difference that matters, more than 0"
    return ""


def _number(told: Any) -> float | None:
    """A finite number, or a text with one, also as per cent; None for anything else."""
    if isinstance(told, bool) or told is None:
        return None
    percent = _PERCENT.fullmatch(str(told))
    try:
        value = float(percent[1]) / 100 if percent else float(told)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _conflicts(limits: Sequence[Limit]) -> list[str]:
    """Pairs of limits that no value can keep."""
    problems = []
    for test in dict.fromkeys(limit.test for limit in limits):
        bounds = {(limit.name, limit.kind): limit for limit in in_force(limits, test)}
        for (name, kind), low in bounds.items():
            high = bounds.get((name, "at_most"))
            if kind == "at_least" and high is not None and low.bound > high.bound:
                problems.append(
                    f"limits.{low.metric} at_least {low.bound:g} and limits.{high.metric} at_most "
                    f"{high.bound:g} contradict each other: no value keeps both"
                )
    return list(dict.fromkeys(problems))
