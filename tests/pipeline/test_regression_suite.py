"""A suite's checks bound to its folder and cluster, and found again in a baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.bench.settings import ThroughputSettings
from pipeline.compare.settings import CompareSettings
from pipeline.errors import SettingsError
from pipeline.regression.outcome import Baseline, Measured
from pipeline.regression.pairing import aligned
from pipeline.regression.settings import RegressionSettings, SuiteSettings
from pipeline.regression.suite import Check, bound, says, suite_key, without_absent_peers
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)

PPL = PerplexitySettings(
    model=ModelSettings("a.gguf"), data=DataSettings("pydoc", "t.txt"), protocol=ProtocolSettings(limit=4)
)
SUITE = RegressionSettings(
    SuiteSettings("s", {"a": {}}),
    cluster=ClusterSettings("ray", workers=8, threads_per_worker=2, address="h:1"),
    paths=PathsSettings("r", "c"),
    seed=3,
)


def check(name: str, given: dict | None = None, limits: tuple = ()) -> Check:
    return Check(name, "perplexity", PPL, limits, 1, says(PPL), given or {})


def test_a_check_has_the_suites_cluster_paths_and_seed_and_no_mlflow() -> None:
    own = replace(PPL, cluster=ClusterSettings(workers=2, windows_per_shard=1))
    found = bound(own, {"cluster.windows_per_shard": 1}, SUITE)
    assert found.cluster == replace(SUITE.cluster, windows_per_shard=1)
    assert (found.tracking.kind, found.paths, found.seed) == ("none", SUITE.paths, 3)
    assert bound(own, {"cluster.workers": 2}, SUITE).cluster.workers == 2
    assert check("a").at(Path("/x")).paths.results == "/x"


def test_a_speed_is_of_one_process_whatever_the_cluster() -> None:
    cluster = bound(ThroughputSettings(ModelSettings("a.gguf")), {}, SUITE).cluster
    assert (cluster.kind, cluster.workers, cluster.threads_per_worker) == ("inline", 1, 2)


def test_the_key_is_of_what_checks_do_not_of_their_limits() -> None:
    suite = SUITE.suite
    key = suite_key(suite, [check("a", {"protocol.limit": 4})])
    assert key == suite_key(suite, [check("a", {"protocol.limit": 4}, limits=("other",))])
    assert key != suite_key(suite, [check("a", {"protocol.limit": 5})])
    assert key != suite_key(suite, [check("b", {"protocol.limit": 4})])
    assert key != suite_key(replace(suite, name="t"), [check("a", {"protocol.limit": 4})])


def test_peers_that_are_not_installed_are_skipped_and_said() -> None:
    speed = ThroughputSettings(ModelSettings("a.gguf"), peer=["llama_cpp", "pagemill_int8", "ik_llama_cpp"])
    found, remarks = without_absent_peers(speed, {"llama_cpp": False, "ik_llama_cpp": True})
    assert found.peer == ["pagemill_int8", "ik_llama_cpp"]
    assert len(remarks) == 1
    assert "peer llama_cpp is skipped" in remarks[0]
    assert without_absent_peers(PPL, {}) == (PPL, [])


def test_what_is_measured_is_said_in_a_line() -> None:
    assert says(PPL) == "perplexity of a.gguf on pydoc, 4 windows of 512 tokens"
    compare = CompareSettings(base=ModelSettings("x/b.gguf"), variants=["Q8_0", "y/v.gguf"], data=PPL.data)
    compare.protocol = ProtocolSettings("carry", limit=None)
    assert says(compare) == ("Q8_0, v.gguf beside b.gguf on pydoc, all windows of 512 tokens, protocol carry")
    speed = ThroughputSettings(models=["a.gguf", "b.gguf"], peer=["llama_cpp"])
    assert says(speed) == "speed of a.gguf, b.gguf beside llama_cpp, 5 rounds"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"action": "chek"}, "action=chek is not known; did you mean check?"),
        ({"suite": SuiteSettings()}, "suite is not set; give suite=smoke"),
        ({"suite": SuiteSettings("s")}, "suite s has no checks"),
        ({"suite": SuiteSettings("", {"a": {}})}, "the suite has no name"),
        ({"baseline": " "}, "baseline is empty"),
        (
            {"tracking": TrackingSettings("none")},
            "no baseline is named, and tracking=none; give baseline=FILE",
        ),
        ({"tracking": TrackingSettings("none"), "baseline": "nightly"}, "baseline=nightly is of MLflow"),
        (
            {"tracking": TrackingSettings("none"), "baseline": "b.parquet", "run": "abc"},
            "run=abc is of MLflow",
        ),
        ({"cluster": ClusterSettings("locl")}, "cluster.kind=locl is not known"),
        ({"tracking": TrackingSettings("server")}, "tracking=server needs tracking.uri"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(change, told) -> None:
    with pytest.raises(SettingsError) as refused:
        replace(SUITE, **change).validate()
    assert told in str(refused.value)


def test_a_promoted_run_needs_no_suite_and_files_become_absolute(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    s = RegressionSettings(action="promote", run="r.parquet", baseline="tag")
    assert s.validate() == []
    assert (s.resolved().run, s.resolved().baseline) == (str(tmp_path / "r.parquet"), "tag")


def measured(check: str, variant: str, data: str) -> Measured:
    return Measured(check, "perplexity", variant, data, {}, {"was": (variant, data)}, {})


def then(*ids: tuple[str, str, str]) -> Baseline:
    return Baseline("b", "f", None, {}, [measured(*one) for one in ids])


@pytest.mark.parametrize(
    ("before", "today", "expected"),
    [
        ([("c", "a", "t")], [("c", "a", "t")], [("c", "a", "t")]),
        ([("c", "a", "t")], [("c", "b", "t")], [("c", "b", "t")]),  # another model
        ([("c", "a", "t")], [("c", "b", "u")], [("c", "b", "u")]),  # and another text
        ([("c", "a", "t")], [("d", "b", "t")], [("c", "a", "t")]),  # another check
        (
            [("c", "a", "ppl"), ("c", "a", "tg")],
            [("c", "b", "ppl"), ("c", "b", "pp")],
            [("c", "b", "ppl"), ("c", "a", "tg")],
        ),
        (
            [("c", "Q8", "t"), ("c", "Q4", "t")],
            [("c", "Q8", "u"), ("c", "Q4", "u")],
            [("c", "Q8", "u"), ("c", "Q4", "u")],
        ),
        (
            [("c", "Q8", "t"), ("c", "Q4", "t")],
            [("c", "Q8", "t"), ("c", "Q2", "t")],
            [("c", "Q8", "t"), ("c", "Q2", "t")],
        ),
        (
            [("c", "Q8", "t"), ("c", "Q4", "t")],
            [("c", "Q6", "t"), ("c", "Q2", "t")],  # which is which is anybody's guess
            [("c", "Q8", "t"), ("c", "Q4", "t")],
        ),
    ],
)
def test_a_check_with_another_model_or_text_is_still_the_same_check(before, today, expected) -> None:
    found = aligned(then(*before), today)
    assert [one.id for one in found.measured] == expected
    assert [one.subject["was"] for one in found.measured] == [(v, d) for _, v, d in before]
