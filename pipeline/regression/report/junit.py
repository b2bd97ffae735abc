"""The run as JUnit XML, as Jenkins, GitLab and the actions of GitHub read it: a test case for each limit.

    testsuites > testsuite (the suite) > properties, testcase (classname suite.check, name metric limit [of])
        > failure   the limit is broken
        > skipped   it could not be judged
        > error     of the case `complete`: not everything was measured

Source of the form: the schema of Jenkins' xUnit plugin (junit-10.xsd), https://github.com/jenkinsci/xunit-plugin
"""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from pipeline.regression.history import moment
from pipeline.regression.outcome import Culprit, Gate, Outcome
from pipeline.regression.report import words
from pipeline.report.text import short_paths

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""


def document(outcome: Outcome) -> str:
    """The whole file."""
    cases = [_case(outcome, gate, seconds) for gate, seconds in _timed(outcome)]
    n_failed = sum(gate.passed is False for gate in outcome.gates)
    n_skipped = sum(gate.passed is None for gate in outcome.gates)
    n_errors = 0
    if outcome.verdict == "incomplete":
        n_errors = 1
        cases.append(_incomplete(outcome))
    counts = {"tests": str(len(cases)), "failures": str(n_failed), "errors": str(n_errors)}
    seconds = outcome.provenance.get("wall_s")
    if isinstance(seconds, (int, float)):
        counts["time"] = f"{seconds:.3f}"
    root = Element("testsuites", {"name": "pagemill regression", **counts})
    named = {"name": _text(outcome.suite), **counts, "skipped": str(n_skipped)}
    suite = SubElement(root, "testsuite", named)
    when = moment(outcome.provenance.get("finished_at"))
    if when is not None:
        suite.set("timestamp", f"{when:%Y-%m-%dT%H:%M:%S}")
    if outcome.provenance.get("host"):
        suite.set("hostname", _text(str(outcome.provenance["host"])))
    properties = SubElement(suite, "properties")
    for name, found in _properties(outcome).items():
        SubElement(properties, "property", {"name": _text(name), "value": _text(found)})
    suite.extend(cases)
    if outcome.warnings:
        SubElement(suite, "system-err").text = _text("\n".join(outcome.warnings))
    indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(root, encoding="unicode")}\n'


def _properties(outcome: Outcome) -> dict[str, str]:
    """What made the numbers, the baseline's with a prefix; properties may not be none."""
    found = {"verdict": outcome.verdict, "run key": outcome.run_key}
    for name, now, then in words.provenance(outcome):
        found[name] = now
        if outcome.baseline is not None:
            found[f"baseline {name}"] = then
    if outcome.baseline is not None:
        found["baseline"] = outcome.baseline.name
    return {name: said for name, said in found.items() if said != words.DASH}


def _timed(outcome: Outcome) -> list[tuple[Gate, float]]:
    """Gates with their seconds: those of a measurement, where they are known, with its first gate."""
    left = {
        found.id: float(found.metrics["wall_s"]) for found in outcome.measured if found.metrics.get("wall_s")
    }
    return [(gate, left.pop((gate.name, gate.variant, gate.data), 0.0)) for gate in outcome.gates]


def _case(outcome: Outcome, gate: Gate, seconds: float) -> Element:
    of = ", ".join(part for part in (gate.variant, gate.data) if part)
    case = Element(
        "testcase",
        {
            "classname": _text(f"{outcome.suite}.{gate.name}"),
            "name": _text(f"{gate.metric} {gate.limit}{f' [{of}]' if of else ''}"),
            "time": f"{seconds:.3f}",
        },
    )
    if gate.passed is None:
        SubElement(case, "skipped", {"message": _text(gate.note or "could not be judged")})
    elif not gate.passed:
        message = f"{gate.metric} is {words.value(gate.value)}, expected {gate.limit}"
        if gate.baseline is not None:
            message += f" (baseline {words.value(gate.baseline)})"
        failure = SubElement(case, "failure", {"type": "regression", "message": _text(message)})
        culprits = [found for found in outcome.culprits if _explains(found, gate)]
        lines = [gate.note, *(found.sentence for found in culprits)]
        lines += [f"value {gate.value!r}, baseline {gate.baseline!r}"]
        failure.text = _text("\n".join(line for line in lines if line))
    return case


def _explains(culprit: Culprit, gate: Gate) -> bool:
    same = (culprit.name, culprit.variant, culprit.data) == (gate.name, gate.variant, gate.data)
    return same and (not culprit.metrics or gate.metric in culprit.metrics)


def _incomplete(outcome: Outcome) -> Element:
    """Not all was measured: that the rest is kept says nothing of it."""
    case = Element("testcase", {"classname": _text(outcome.suite), "name": "complete", "time": "0.000"})
    error = SubElement(case, "error", {"type": "incomplete", "message": "not everything could be measured"})
    error.text = _text("\n".join(outcome.warnings))
    return case


def _text(said: str) -> str:
    return _NO_XML.sub("\ufffd", short_paths(said))
