"""`pagemill regression` as a command: suites composed from files and words, and one run of a tiny model."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from jobs import gates, suites
from jobs.overrides import quote_paths
from pipeline import RunResult
from pipeline.compare.settings import CompareSettings
from pipeline.errors import SettingsError
from pipeline.regression.settings import RegressionSettings, SuiteSettings
from pipeline.regression.suite import Check
from tests.make_gguf import tiny_llama

SUITE = """\
name: mine
checks:
  ppl:
    job: perplexity
    set: {model.path: m.gguf, data.path: t.txt, protocol: {window: 64, limit: 4}}
    limits: {ppl: {at_most: 20}, nll_sha256: {equal: true}}
  pair:
    job: compare
    set: {base.path: m.gguf, variants: [Q8_0], data: pydoc, cluster.workers: 1}
    limits: {kld_mean: '<=0.1'}
  speed:
    job: throughput
    set: {model.path: m.gguf, bench.kinds: [perplexity], peer: [llama_cpp]}
    limits: {fma_share: {fall: 0.15}, ratio/llama_cpp: 0.1}
"""
SUMMARY: dict[str, Any] = {
    "exit_code": 0, "verdict": "passed", "gates": [], "culprits": [], "baseline": None, "promoted": None,
    "record": None, "summary": None, "junit": None, "report": None, "warnings": [],
}  # fmt: skip


@pytest.fixture
def seen(monkeypatch, tmp_path) -> list[tuple[Any, list[Check]]]:
    """Settings and checks that the command line hands to the pipeline."""
    found: list[tuple[Any, list[Check]]] = []

    def run(settings, checks, progress) -> RunResult:
        found.append((settings, list(checks)))
        return RunResult(dict(SUMMARY), [], "", 0)

    monkeypatch.setattr("pipeline.regression.run.run", run)
    (tmp_path / "my suite.yaml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    return found


def checks_of(seen) -> dict[str, Check]:
    [(_, checks)] = seen
    return {check.name: check for check in checks}


FILE = "suite=my suite.yaml"
LAST = "cluster.workers: 1"


def test_a_suite_of_the_users_own_is_composed_as_each_job_would_be(pagemill, seen) -> None:
    answer = pagemill(
        "regression", FILE, "cluster=inline", "paths.results=r", "baseline=a b.parquet", "tracking=none"
    )
    assert answer.exit_code == 0, answer.stderr
    assert answer.line["verdict"] == "passed"
    [(s, _)] = seen
    assert (s.suite.name, s.baseline, s.cluster.kind) == ("mine", "a b.parquet", "inline")
    found = checks_of(seen)
    assert list(found) == ["ppl", "pair", "speed"]
    ppl = found["ppl"].settings
    assert (ppl.model.path, ppl.protocol.window, ppl.protocol.limit) == ("m.gguf", 64, 4)
    assert (ppl.cluster.kind, ppl.paths.results, ppl.tracking.kind) == ("inline", "r", "none")
    pair = found["pair"].settings
    assert isinstance(pair, CompareSettings)
    assert (pair.base.path, pair.variants, pair.data.path) == ("m.gguf", ["Q8_0"], "python:pydoc_data.topics")
    assert (pair.limits, pair.cluster.workers) == ({}, 1)
    assert [str(limit) for limit in found["speed"].limits] == [">= 0.85 x baseline", ">= 0.1"]
    assert (found["ppl"].n_traced, found["speed"].n_traced) == (1, 0)


def test_a_choice_of_conf_is_a_suite(pagemill, seen) -> None:
    assert pagemill("regression", "suite=smoke").exit_code == 0
    assert list(checks_of(seen)) == ["smollm2_pydoc", "smollm2_quantized", "smollm2_speed"]
    assert checks_of(seen)["smollm2_quantized"].settings.base.path.endswith("Q4_1.gguf")


def test_words_change_a_check(pagemill, seen) -> None:
    words = [
        "suite.checks.ppl.set.protocol.limit=2",
        "suite.checks.ppl.set.model.path=~/a b,c=1.gguf",
        "suite.checks.ppl.set={data:pydoc,protocol.window:32}",
        "suite.checks.pair.set.variants=[Q4_0,x y.gguf]",
        "suite.checks.ppl.limits.ppl.at_most=3",
        "suite.checks.ppl.limits.byte_ppl=<=2",
        "suite.checks.speed.limits.ratio/llama_cpp.at_least=0.2",
        "suite.checks.ppl.trace=0",
    ]
    answer = pagemill("regression", FILE, *words)
    assert answer.exit_code == 0, answer.stderr
    found = checks_of(seen)
    s = found["ppl"].settings
    assert (s.protocol.limit, s.protocol.window, s.data.name) == (2, 32, "pydoc")
    assert s.model.path == str(Path("~/a b,c=1.gguf").expanduser())
    assert found["pair"].settings.variants == ["Q4_0", "x y.gguf"]
    limits = {(limit.metric, limit.kind): limit.bound for limit in found["ppl"].limits}
    assert limits["ppl", "at_most"] == 3
    assert limits["byte_ppl", "at_most"] == 2
    assert [limit.bound for limit in found["speed"].limits if limit.kind == "at_least"] == [0.2]
    assert found["ppl"].n_traced == 0


def test_words_of_a_check_mean_the_same_however_they_are_added() -> None:
    expected = ["++suite.checks.a-b.set={model.path:'x y.gguf'}", "++suite.checks.a-b.trace=2"]
    for prefix in ("", "+", "++"):
        words = [f"{prefix}suite.checks.a-b.set.model.path=x y.gguf", f"{prefix}suite.checks.a-b.trace=2"]
        assert quote_paths(words) == expected


def test_checks_can_be_left_out_and_added(pagemill, seen) -> None:
    more = "suite.checks.more={job: perplexity, set: {model.path: x.gguf, data: pydoc}, limits: {ppl: 3}}"
    assert pagemill("regression", FILE, "~suite.checks.speed", "~suite.checks.pair", more).exit_code == 0
    assert list(checks_of(seen)) == ["ppl", "more"]


def test_a_name_of_mlflows_is_no_number(pagemill, seen) -> None:
    assert pagemill("regression", "action=promote", "run=12345e67", "baseline=007").exit_code == 0
    [(s, checks)] = seen
    assert (s.run, s.baseline, checks) == ("12345e67", "007", [])


@pytest.mark.parametrize(
    ("words", "others", "told"),
    [
        ("job: perplexity", "job: perplexty", "ppl: job perplexty is not known; did you mean perplexity?"),
        ("    limits: {ppl", "    limts: {ppl", "ppl: limts is not known; did you mean limits?"),
        ("limit: 4", "limt: 4", "set.protocol.limt is not a key of perplexity; did you mean protocol.limit?"),
        ("data: pydoc", "data: pydco", "data=pydco: there is no such choice; did you mean data=pydoc?"),
        ("window: 64", "window: many", "ppl: set.protocol.window=many: "),
        ("data.path: t.txt, ", "", "ppl: data.path is not set; give it in `set`"),
        ("data.path: t.txt", "paths.results: x", "ppl: set.paths.results is the suite's"),
        (LAST, "cluster.kind: ray", "a check may set cluster.workers"),
        (LAST, "tracking: local", "pair: set.tracking is the suite's"),
        (LAST, "stop: decided", "pair: set.stop would have other windows every night"),
        (LAST, "limits: {ppl: 3}", "pair: set.limits are beside `set`"),
        (LAST, "engine: fast", "pair: set: engine=fast: there is no such choice"),
        (LAST, "quantize: 3", "pair: set.quantize=3 is no choice of compare's"),
        ("ppl: {at_most: 20}", "pppl: {at_most: 20}", "limits.pppl is not known; did you mean ppl?"),
        ("fma_share: {fall", "fma_share/tg64: {fall", "there is no such test"),
        ("  pair:", "  'pa ir':", "'pa ir' is no name of a check"),
        ("limits: {kld_mean: '<=0.1'}", "limits: 3", "pair: limits: expected metrics with their bounds"),
        ("limits: {kld_mean: '<=0.1'}", "trace: -1", "pair: trace: -1 is no number of windows"),
        ("set: {base.path", "set: 3\n    lost: {base.path", "pair: set: expected keys of compare, found 3"),
    ],
)
def test_what_a_check_cannot_be_told_is_refused(words, others, told) -> None:
    assert words in SUITE
    checks = OmegaConf.to_container(OmegaConf.create(SUITE.replace(words, others)))["checks"]
    before = OmegaConf.to_container(OmegaConf.create(SUITE))["checks"]
    [name] = [name for name in checks if checks[name] != before.get(name)]
    settings = RegressionSettings(SuiteSettings("mine", {name: checks[name]}))
    with initialize_config_module("conf", version_base="1.3"), pytest.raises(SettingsError) as refused:
        suites.checks(settings)
    assert told in str(refused.value)
    assert str(refused.value).startswith("suite mine has ")


def test_all_problems_of_a_suite_are_told_at_once(pagemill, seen) -> None:
    text = SUITE.replace("limit: 4", "limt: 4").replace("kld_mean", "kld_men").replace("fall", "rise")
    Path("my suite.yaml").write_text(text)
    message = pagemill("regression", FILE).line["error"]["message"]
    assert message.startswith("suite mine has 3 problems:")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["suite=no such.yaml"], "suite=no such.yaml: No such file"),
        (["suite=smok"], "suite=smok: there is no such choice"),
        ([], "suite is not set"),
        (["suite=smoke", "action=promot"], "action=promot is not known; did you mean promote?"),
        ([FILE, "suite.checks.pppl.set.protocol.limit=2"], "did you mean the check ppl?"),
        ([FILE, "suite.chekcs.ppl.trace=2"], "suite.checks"),
        ([FILE, "cluster=locl"], "cluster=locl"),
        ([FILE, "tracking=none"], "no baseline is named"),
        ([FILE, "suite.checks.ppl=3"], "ppl: expected job, set and limits, found 3"),
    ],
)
def test_words_that_cannot_be_used_are_refused(pagemill, seen, words, told) -> None:
    answer = pagemill("regression", *words)
    assert answer.exit_code == 2
    assert told in f"{answer.line['error']['message']} {answer.line['error']['hint']}"
    assert seen == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x", "has no checks"),
        ("- a", "has no checks"),
        ("a: [", "is no YAML"),
        ("a: 1\na: 2", "is no YAML"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(pagemill, seen, text, told) -> None:
    Path("x.yaml").write_text(text)
    answer = pagemill("regression", "suite=x.yaml")
    assert (answer.exit_code, answer.line["error"]["type"]) == (2, "SettingsError")
    assert told in answer.line["error"]["message"]


def test_a_suite_without_a_name_is_called_as_its_file(pagemill, seen) -> None:
    Path("own.yml").write_text(SUITE.replace("name: mine\n", ""))
    assert pagemill("regression", "suite='own.yml'").exit_code == 0
    assert seen[0][0].suite.name == "own"


def gate(passed: bool | None, **more: Any) -> dict[str, Any]:
    told = {
        "name": "one",
        "variant": "m",
        "data": "t",
        "metric": "ppl",
        "value": 12.3456789,
        "baseline": None,
    }
    return told | {"limit": "<= 12", "passed": passed, "note": ""} | more


def test_gates_are_shown_broken_ones_first_with_who_is_to_blame() -> None:
    text = io.StringIO()
    found = [
        gate(True, value="f" * 64, metric="nll_sha256", baseline="f" * 64),
        gate(None, note="of [another] subject"),
        gate(False),
    ]
    summary = SUMMARY | {"gates": found, "culprits": [{"sentence": "m is [worse]"}], "report": "/r/x y.html"}
    summary |= {"baseline": {"name": "b", "source": "s", "run": None}, "verdict": "regression"}
    gates.show(summary, Console(file=text, width=40))
    lines = text.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["broken", "not", "of", "kept"]
    assert "12.3457" in lines[1]
    assert "ffffffff.." in lines[4]
    assert lines[5:] == ["m is [worse]", "regression, beside b (s)", "report: /r/x y.html"]


def test_limits_that_wait_for_a_baseline_are_counted_and_a_plan_is_listed() -> None:
    text = io.StringIO()
    plan = [{"check": "one", "says": "what", "limits": ["ppl <= 3"]}]
    gates.show(SUMMARY | {"gates": [gate(True), gate(None)], "plan": plan}, Console(file=text, width=40))
    assert text.getvalue().splitlines()[:2] == ["one  what", "  ppl <= 3"]
    assert "1 limits wait for a baseline" in text.getvalue()
    assert "not judged" not in text.getvalue()


def test_a_tiny_model_from_no_baseline_to_green_and_red(pagemill, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "altair", None)  # pages have tests of their own
    monkeypatch.setattr("pipeline.compare.report.write", lambda *_, **__: tmp_path / "report.html")
    sizes = {"n_layers": 2, "width": 32, "ff": 64, "context": 128}
    for name, seed in {"m": 0, "worse": 1}.items():
        tiny_llama(tmp_path / f"{name}.gguf", seed=seed, **sizes)
    Path("t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    Path("suite.yaml").write_text(
        """\
name: tiny
checks:
  ppl:
    job: perplexity
    set: {model.path: m.gguf, data.path: t.txt, protocol: {window: 64, limit: 4}}
    limits: {ppl: {rise: 1e-9}, nll_sha256: {equal: true}, model_sha256: {equal: true}}
    trace: 2
  pair:
    job: compare
    set: {base.path: m.gguf, variants: [Q8_0], data.path: t.txt, protocol: {window: 64, limit: 4}}
    limits: {kld_sha256: {equal: true}, kld_mean: {at_most: 1, effect: 0.1}}
"""
    )
    given = ("regression", "suite=suite.yaml", "cluster=inline", "tracking=none", "baseline=b.parquet",
             "paths.results=r", "paths.cache=c")  # fmt: skip
    first = pagemill(*given)
    assert first.line["error"]["type"] == "NoBaseline"
    assert "regression suite=suite.yaml action=promote" in first.line["error"]["hint"]
    made = pagemill(*given, "action=promote")
    assert made.exit_code == 0, made.stderr
    assert Path("b.parquet").is_file()

    green = pagemill(*given)
    assert (green.exit_code, green.line["verdict"]) == (0, "passed"), green.stderr
    assert all(gate["passed"] for gate in green.line["gates"])
    assert len(green.line["gates"]) == 6
    assert Path(green.line["junit"]).is_file()

    red = pagemill(*given, "suite.checks.ppl.set.model.path=worse.gguf")
    assert red.exit_code in (0, 1), red.stderr
    by_metric = {gate["metric"]: gate["passed"] for gate in red.line["gates"] if gate["name"] == "ppl"}
    assert (by_metric["model_sha256"], by_metric["nll_sha256"]) == (False, None)
    culprit = red.line["culprit"]
    assert "model_sha256" in culprit["differs"]
    assert culprit["layer"] == "token_embd"
    assert "broken" in red.stderr

    Path("t.txt").write_text("Another text. " * 300)
    other = pagemill(*given)
    assert (other.exit_code, other.line["error"]["type"]) == (2, "OtherMeasure")
    assert "ppl: data_sha256" in other.line["error"]["message"]
    Path("t.txt").unlink()
    gone = pagemill(*given)
    assert gone.exit_code == 2
    assert "2 of 2 checks cannot run" in gone.line["error"]["message"]
