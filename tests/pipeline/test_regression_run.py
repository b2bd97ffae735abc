"""A suite's whole way with checks that are made up: refused, measured, judged, kept, gone on with."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import RunResult, store
from pipeline.errors import IncompleteError, ModelError, RefusedError, SettingsError
from pipeline.metrics import nll_sha256
from pipeline.regression import invocation, run
from pipeline.regression.baselines import NoBaseline
from pipeline.regression.limits import limits_of
from pipeline.regression.measure import Ahead, by_round, chosen
from pipeline.regression.outcome import Measured, Outcome, WindowSums
from pipeline.regression.settings import RegressionSettings, SuiteSettings
from pipeline.regression.suite import Check
from pipeline.settings import ModelSettings, PathsSettings, PerplexitySettings, TrackingSettings

LIMITS = {
    "nll_sha256": {"equal": True},
    "ppl": {"at_most": 30, "rise": 0.01},
    "ln_ppl": {"effect": 0.005, "confidence": 0.99},
}
N = 8


@dataclass
class Fake:
    """Measures two checks as it is told to."""

    model: str = "a" * 64
    data: str = "d" * 64
    shift: float = 0.0  # of every window's sum, nats
    n_windows: int = N
    refuses: dict[str, RefusedError] = field(default_factory=dict)
    fails: dict[str, Exception] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    @property
    def measure_of(self) -> dict:
        return {"data_sha256": self.data, "protocol": "windows"}

    def name(self, check: Check) -> str:
        return f"model-{self.model[:1]}"

    def look(self, check: Check, folder: Path) -> list[Ahead]:
        if check.name in self.refuses:
            raise self.refuses[check.name]
        return [Ahead((check.name, self.name(check), "t"), self.measure_of)]

    def measure(self, check: Check, folder: Path, progress: object) -> list[Measured]:
        assert folder.is_dir()
        self.calls.append(check.name)
        if check.name in self.fails:
            raise self.fails[check.name]
        counts = np.full(self.n_windows, 100)
        sums = np.linspace(290, 310, self.n_windows) + self.shift
        return [
            Measured(
                check.name, "perplexity", self.name(check), "t", self.measure_of,
                {"model_sha256": self.model, "numerics": 1},
                {"ppl": math.exp(sums.sum() / counts.sum())},
                bits={"nll_sha256": nll_sha256(sums), "model_sha256": self.model},
                windows=WindowSums(np.arange(self.n_windows), np.zeros(self.n_windows, np.int64),
                                   100 * np.arange(self.n_windows), counts, sums),
            )
        ]  # fmt: skip


def checks(told: dict | None = None) -> list[Check]:
    limits, problems = limits_of("one", "perplexity", LIMITS if told is None else told)
    assert not problems
    settings = PerplexitySettings(model=ModelSettings("m.gguf"))
    return [
        Check("one", "perplexity", settings, limits, 0, "the first", {"n": 1}),
        Check("two", "perplexity", settings, limits[:1], 0, "the second", {"n": 2}, ["two: a remark"]),
    ]


@pytest.fixture(autouse=True)
def _plain_reports(monkeypatch) -> None:
    """Reports have tests of their own, and take a second each."""

    def write(outcome: Outcome, folder: Path, rows: list) -> dict[str, str | None]:
        folder.mkdir(parents=True, exist_ok=True)
        for ending in ("md", "xml"):
            (folder / f"regression.{ending}").write_text(outcome.verdict)
        return {"summary": f"{folder}/regression.md", "junit": f"{folder}/regression.xml", "report": None}

    monkeypatch.setattr("pipeline.regression.report.write", write)


@pytest.fixture
def go(tmp_path) -> Callable[..., RunResult]:
    """Runs the suite without MLflow; the baseline is a file."""

    def go(measurer: Fake, of: list[Check] | None = None, **changes: object) -> RunResult:
        s = RegressionSettings(
            SuiteSettings("s", {"one": {}, "two": {}}),
            baseline=str(tmp_path / "b.parquet"),
            tracking=TrackingSettings("none"),
            paths=PathsSettings(str(tmp_path / "results"), str(tmp_path / "cache")),
        )
        return run.run(replace(s, **changes), checks() if of is None else of, measurer=measurer)

    return go


@pytest.fixture
def promoted(go) -> RunResult:
    return go(Fake(), action="promote")


def verdicts(result: RunResult) -> dict[tuple[str, str], bool | None]:
    return {
        (gate["name"], gate["metric"] + gate["limit"][:2]): gate["passed"] for gate in result.summary["gates"]
    }


def test_from_nothing_to_a_baseline_and_a_green_verdict(go, promoted, tmp_path) -> None:
    assert (promoted.exit_code, promoted.summary["verdict"]) == (0, "promoted")
    assert str(tmp_path / "b.parquet") in promoted.summary["promoted"]
    assert promoted.warnings == ["two: a remark"]
    again = go(Fake())
    assert (again.exit_code, again.summary["verdict"], again.summary["error"]) == (0, "passed", None)
    assert set(verdicts(again).values()) == {True}
    assert again.summary["culprit"] is None
    for key in ("summary", "junit", "record"):
        assert Path(again.summary[key]).is_file()
    assert len(list(Path(again.table).glob("run-*.parquet"))) == 2, "a record for each run"
    assert again.summary["checks"] == {"one": "the first", "two": "the second"}
    assert again.summary["baseline"]["source"] == str(tmp_path / "b.parquet")


def test_each_run_measures_anew(go, promoted) -> None:
    fake = Fake()
    assert go(fake).exit_code == 0
    assert fake.calls == ["one", "two"]


def test_a_worse_model_of_another_name_is_a_regression_that_names_it(go, promoted) -> None:
    worse = go(Fake(model="b" * 64, shift=5.0))
    assert (worse.exit_code, worse.summary["verdict"], worse.summary["ok"]) == (1, "regression", False)
    assert verdicts(worse) == {
        ("one", "nll_sha256= "): None,  # of another subject
        ("one", "ppl<="): False,
        ("one", "ln_pplno"): False,
        ("two", "nll_sha256= "): None,
    }
    assert worse.summary["culprit"]["name"] == "one"
    assert worse.summary["culprit"]["differs"]["model_sha256"] == ("a" * 64, "b" * 64)
    assert worse.summary["error"]["type"] == "Regression"
    assert "limits are broken" in worse.summary["error"]["message"]


def test_other_bits_of_the_same_subject_are_a_regression(go, promoted) -> None:
    found = go(Fake(shift=1e-9))
    assert found.exit_code == 1
    assert verdicts(found)["one", "nll_sha256= "] is False
    assert verdicts(found)["one", "ln_pplno"] is True


def test_another_text_is_refused_before_anything_is_measured(go, promoted) -> None:
    fake = Fake(data="e" * 64)
    with pytest.raises(
        SettingsError, match=r"one: data_sha256 d{12}\.\.\. in the baseline, e{12}\.\.\. now"
    ) as e:
        go(fake)
    assert (e.value.kind, e.value.exit_code) == ("OtherMeasure", 2)
    assert fake.calls == []


def test_a_missing_window_is_refused_and_the_run_is_not_gone_on_with(go, promoted) -> None:
    with pytest.raises(SettingsError, match=r"n_windows 8 in the baseline, 7 now") as refused:
        go(Fake(n_windows=N - 1))
    assert refused.value.kind == "OtherMeasure"
    whole = Fake()
    assert go(whole).exit_code == 0
    assert whole.calls == ["one", "two"], "nothing of the run with a window missing is used"


def test_without_a_baseline_the_command_that_makes_one_is_told(go, tmp_path) -> None:
    fake = Fake()
    with pytest.raises(NoBaseline) as refused:
        go(fake)
    assert "action=promote" in refused.value.hint
    assert fake.calls == []
    assert not list((tmp_path / "results").rglob("run-*"))


def test_all_checks_that_cannot_run_are_told_at_once(go) -> None:
    fake = Fake(
        refuses={"one": ModelError("m.gguf: no such file", "a hint"), "two": SettingsError("x is wrong")}
    )
    with pytest.raises(SettingsError) as refused:
        go(fake, action="promote")
    assert str(refused.value) == "2 of 2 checks cannot run:\n  one: m.gguf: no such file\n  two: x is wrong"
    fake.refuses.pop("two")
    with pytest.raises(SettingsError, match=r"^one: m\.gguf: no such file$") as refused:
        go(fake, action="promote")
    assert refused.value.kind == "ModelError"
    assert refused.value.hint.startswith(
        "a hint; suite.checks.one.set.KEY=VALUE changes a check, ~suite.checks"
    )
    assert fake.calls == []


def test_a_check_that_fails_leaves_the_others_and_is_made_good_by_the_same_command(go, promoted) -> None:
    fake = Fake(fails={"one": IncompleteError("1 of 3 shards were set aside", "look")})
    found = go(fake)
    assert (found.exit_code, found.summary["verdict"]) == (3, "incomplete")
    assert fake.calls == ["one", "two"]
    assert "one: 1 of 3 shards were set aside" in found.summary["error"]["message"]
    assert {gate["name"] for gate in found.summary["gates"]} == {"two"}
    assert found.summary["record"] is None
    fake = Fake()
    again = go(fake)
    assert again.exit_code == 0
    assert fake.calls == ["one"]
    assert "goes on with the run begun" in again.warnings[-1]


def test_a_suite_whose_first_check_cannot_start_is_refused(go, promoted) -> None:
    with pytest.raises(RefusedError, match="no worker"):
        go(Fake(fails={"one": RefusedError("no worker")}))


@pytest.mark.parametrize(("again", "verdict", "exit_code"), [(0.8, "passed", 0), (0.5, "regression", 1)])
def test_a_slow_speed_is_measured_again_and_then_counts(go, again, verdict, exit_code) -> None:
    limits, _ = limits_of("speed", "throughput", {"fma_share": {"fall": 0.15}}, tests=["ppl512"])
    speed = Check("speed", "throughput", checks()[0].settings, limits, 0, "a speed", {})
    of, shares = [speed, *checks()], [0.8]

    class Speeds(Fake):
        def look(self, check: Check, folder: Path) -> list[Ahead]:
            return [] if check is speed else super().look(check, folder)

        def measure(self, check: Check, folder: Path, progress: object) -> list[Measured]:
            if check is not speed:
                return super().measure(check, folder, progress)
            self.calls.append("speed")
            share = shares.pop(0)
            return [
                Measured(
                    "speed", "throughput", "m", "ppl512", {}, {}, {"fma_share": share, "tok_per_s": share},
                    samples={"fma_share": [share]},
                )
            ]  # fmt: skip

    go(Speeds(), of, action="promote")
    shares += [0.5, again]
    measurer = Speeds()
    summary = go(measurer, of).summary
    assert (summary["verdict"], summary["exit_code"]) == (verdict, exit_code)
    assert measurer.calls == ["speed", "one", "two", "speed"]
    assert [gate["value"] for gate in summary["gates"] if gate["name"] == "speed"] == [again]
    assert "speed broke a limit and was measured again; the second time counts" in summary["warnings"]


def test_an_interrupted_run_is_gone_on_with(go, promoted) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(Fake(fails={"two": KeyboardInterrupt()}))
    fake = Fake()
    found = go(fake)
    assert fake.calls == ["two"]
    assert (found.exit_code, set(verdicts(found).values())) == (0, {True})


@pytest.mark.parametrize("spoilt", ["engine", "age", "file", "check"])
def test_what_is_left_of_another_engine_or_night_is_not_gone_on_with(go, promoted, spoilt) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(Fake(fails={"two": KeyboardInterrupt()}))
    [file] = [
        path
        for path in Path(promoted.table).glob("run-*/invocation.json")
        if not path.parent.with_suffix(".parquet").exists()
        and not (path.parent.parent / f"{path.parent.name}.parquet").exists()
    ]
    told = json.loads(file.read_text())
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=invocation.TOO_OLD_S + 1)
    told |= {"engine": {"engine_digest": "0"}, "age": {"began": old.isoformat()}}.get(spoilt, {})
    file.write_text("{" if spoilt == "file" else json.dumps(told))
    if spoilt == "check":
        [kept] = (file.parent / "checks").iterdir()
        kept.write_bytes(b"PAR1")
    fake = Fake()
    assert go(fake).exit_code == 0
    assert fake.calls == ["one", "two"]


def test_the_lock_of_a_dead_run_is_taken_over_and_said(go, promoted) -> None:
    lock = Path(promoted.table) / ".driver.lock"
    from pipeline.run_lock import _kernel

    lock.write_text(json.dumps({"host": "h", "pid": 1 << 30, "kernel": _kernel(), "started_ticks": 1}))
    found = go(Fake())
    assert found.exit_code == 0
    assert "the lock of a run that died was taken over" in found.warnings


def test_a_second_run_at_the_same_time_is_refused(go, promoted) -> None:
    with invocation.Invocation(Path(promoted.table).parents[2], "s", promoted.summary["run_key"]):
        with pytest.raises(RefusedError) as refused:
            go(Fake())
    assert refused.value.kind == "RunBusy"


def test_a_baseline_has_to_keep_limits_that_need_none(go, tmp_path) -> None:
    found = go(Fake(shift=100.0), action="promote")
    assert (found.exit_code, found.summary["verdict"], found.summary["promoted"]) == (1, "regression", None)
    assert "has to keep its own limits" in found.summary["error"]["hint"]
    assert not (tmp_path / "b.parquet").exists()


def test_a_run_is_judged_or_promoted_again_by_its_record(go, promoted, tmp_path) -> None:
    worse = go(Fake(shift=5.0))
    assert worse.exit_code == 1
    fake = Fake()
    judged = go(fake, run=worse.summary["record"])
    assert (judged.exit_code, verdicts(judged)) == (1, verdicts(worse))
    assert judged.summary["record"] == worse.summary["record"]
    lenient = go(fake, checks({"ppl": {"rise": 0.5}}), run=worse.summary["record"])
    assert lenient.exit_code == 0
    done = go(fake, [], run=worse.summary["record"], action="promote", suite=SuiteSettings())
    assert (done.exit_code, done.summary["verdict"]) == (0, "promoted")
    assert fake.calls == []
    assert go(Fake(shift=5.0)).exit_code == 0, "what was worse is the baseline now"
    with pytest.raises(SettingsError, match="nothing to plan"):
        go(fake, [], run=worse.summary["record"], action="promote", dry_run=True)


def test_a_dry_run_tells_the_plan(go, promoted) -> None:
    fake = Fake()
    found = go(fake, dry_run=True)
    assert (found.exit_code, fake.calls) == (0, [])
    one, two = found.summary["plan"]
    assert (one["check"], one["says"], one["measures"]) == ("one", "the first", [("model-a", "t")])
    assert one["limits"][0] == "nll_sha256 = baseline"
    assert two["limits"] == ["nll_sha256 = baseline"]
    assert found.summary["verdict"] is None


SERVER = TrackingSettings("server", "http://127.0.0.1:9")  # nobody listens there


def test_a_server_that_is_down_costs_no_results(go, promoted, tmp_path) -> None:
    fake = Fake()
    found = go(fake, tracking=SERVER, baseline=None)
    assert (found.exit_code, found.summary["error"]["type"]) == (2, "ServerDown")
    assert fake.calls == ["one", "two"]
    assert found.summary["verdict"] == "incomplete"
    assert Path(found.summary["summary"]).is_file()
    record = found.summary["record"]
    assert f"action=check run={record}" in found.summary["error"]["hint"]
    assert go(fake, run=record).exit_code == 0, "judged later, by what was kept"

    beside = go(fake, tracking=SERVER)
    assert (beside.exit_code, beside.summary["verdict"]) == (2, "passed")
    assert set(verdicts(beside).values()) == {True}
    assert go(Fake(shift=1.0), tracking=SERVER).exit_code == 1, "what is red is red"

    made = go(fake, tracking=SERVER, baseline=None, action="promote")
    assert (made.exit_code, made.summary["promoted"]) == (2, None)
    assert "action=promote run=" in made.summary["error"]["hint"]
    other = str(tmp_path / "other.parquet")
    to_file = go(fake, tracking=SERVER, baseline=other, action="promote")
    assert to_file.exit_code == 2
    assert other in to_file.summary["promoted"]


def test_a_dry_run_without_the_server_says_that_nothing_would_be_judged(go) -> None:
    found = go(Fake(), tracking=SERVER, baseline=None, dry_run=True)
    assert found.exit_code == 0
    assert "there would be nothing to judge against" in found.warnings[-1]


def test_traced_windows_are_the_first_and_others_spread_over_the_rest() -> None:
    assert chosen(range(10), 1) == [0]
    assert chosen(range(10), 2) == [0, 9]
    assert chosen(range(9), 3) == [0, 4, 8]
    assert chosen([0, 7], 5) == [0, 7]
    assert chosen([], 2) == chosen(range(4), 0) == []


def test_a_speed_is_a_share_of_what_the_machine_did_in_the_same_round() -> None:
    own = {
        "samples": [100.0, 50.0], "flop_per_token": 2e9, "read_bytes_per_token": 1e8,
        "fma_gflops_samples": [400.0, 200.0], "read_gb_per_s_samples": [20.0, 10.0],
    }  # fmt: skip
    rounds = by_round(own, {"llama_cpp": {"samples": [80.0, 40.0]}})
    assert rounds == {
        "tok_per_s": [100.0, 50.0],
        "fma_share": [0.5, 0.5],
        "read_share": [0.5, 0.5],
        "ratio/llama_cpp": [1.25, 1.25],
    }


def test_an_object_store_is_refused(go) -> None:
    with pytest.raises(SettingsError, match=r"paths\.results=s3://bucket/x: `regression` needs a folder"):
        go(Fake(), paths=PathsSettings("s3://bucket/x", "cache"))


def test_results_that_cannot_be_written_are_refused(go, tmp_path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(store.StoreError, match=r"paths\.results"):
        go(Fake(), action="promote")
