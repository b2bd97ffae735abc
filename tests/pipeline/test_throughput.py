"""The benchmark's laws on players of a few lines: turns, the best settings, rows, failures, refusals."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from gguf import LlamaFileType
from make_gguf import tiny_llama

import engine
from pipeline import capacity
from pipeline.bench import limits, preflight, rounds, throughput, work
from pipeline.bench.calls import Workload
from pipeline.bench.players import Measurement, PlayerError
from pipeline.bench.ready import STAGES, ready
from pipeline.bench.settings import KINDS, BenchSettings, ThroughputSettings
from pipeline.bench.work import Case, work_of
from pipeline.errors import ModelError, PipelineError, SettingsError
from pipeline.results import ResultsSettings, Selection, results
from pipeline.runtime import available_cores
from pipeline.settings import EngineSettings, ModelSettings, PathsSettings, TrackingSettings

CONTRACT_KEYS = (
    "job ok exit_code error run_key measure_key table mlflow_run_id wall_s compile_s load_s version numerics "
    "warnings rows ratios fma_gflops gemm_gflops read_gb_per_s open_ms ready_s cpu features"
).split()
ROW_KEYS = "engine kind type n_prompt n_generate n_seqs threads tok_per_s p10 p90 n".split()
READY = {
    "ready_s": 1.5,
    "open_ms": 2.5,
    "compile_s": 0.0,
    "stages": {"imports": 1.0, "digest": 0.5, "score": 1.0},
}
SPEEDS = {"pagemill": 100.0, "llama_cpp": 50.0, "ik_llama_cpp": 80.0}


class FakePlayer:
    """Plays at `SPEEDS`, by 10 tokens/s less for each of option `slow`, and faster with each repetition."""

    log: ClassVar[list[tuple]] = []
    fails_at: ClassVar[dict[str, int]] = {}

    def __init__(self, engine, model_path, *, threads, cores, options, max_tokens, n_seqs):
        self.engine, self.options, self.n = engine, dict(options), 0
        self.info = {"version": f"{engine} 1", "kv": "f16", "ubatch": 512, "load_s": 0.25, "ready_s": 0.5}
        self.log.append(("open", engine, options.get("slow"), threads, len(cores), max_tokens, n_seqs))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.log.append(("close", self.engine, self.options.get("slow")))

    def memory(self):
        return {"pss_bytes": 11, "anonymous_bytes": 22}

    def measure(self, kind, *, n_prompt, n_generate, n_seqs):
        if self.fails_at.get(self.engine) == self.n:
            raise PlayerError(f"{self.engine} fell over")
        self.log.append(("measure", self.engine, self.options.get("slow")))
        speed = SPEEDS[self.engine] - 10 * self.options.get("slow", 0) + self.n
        self.n += 1
        n_tokens = Workload(kind, n_prompt, n_generate, n_seqs).n_tokens
        return Measurement(n_tokens, n_tokens / speed)


@pytest.fixture
def played(monkeypatch):
    """Fake players, and a machine of 1000 GFLOP/s and 10 GB/s; the log of what they did."""
    FakePlayer.log, FakePlayer.fails_at = [], {}
    monkeypatch.setattr(rounds, "Player", FakePlayer)
    monkeypatch.setattr(rounds, "_SETTLE_S", 0.0)
    monkeypatch.setattr(rounds, "options_of", lambda engine, kind: [{"slow": 1}, {"slow": 0}, {"slow": 2}])
    monkeypatch.setattr(preflight, "check_peers", lambda names: None)
    monkeypatch.setattr(throughput, "ready", lambda *_: dict(READY))
    monkeypatch.setattr(engine, "fma_gflops", lambda threads, seconds: 1000.0, raising=False)
    monkeypatch.setattr(engine, "read_gb_per_s", lambda threads: 10.0, raising=False)
    monkeypatch.setattr(engine, "gemm_gflops", lambda file, threads: 900.0, raising=False)
    monkeypatch.setattr(engine, "footprint", lambda file, **_: 1000, raising=False)
    return FakePlayer


@pytest.fixture
def make(tmp_path, played):
    """Settings of a small benchmark; groups can be replaced."""
    tiny_llama(tmp_path / "tiny.gguf", type_name="Q8_0", **{"general.file_type": 7})

    def settings(**groups):
        bench = BenchSettings(prompt=[8], generate=[4], seqs=[1, 3], repeats=4, window=16, windows=2)
        return ThroughputSettings(
            **{
                "model": ModelSettings(str(tmp_path / "tiny.gguf")),
                "bench": bench,
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / "results"), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


def test_a_run_has_every_key_and_a_row_for_each_engine_and_test(make):
    s = throughput.run(make(peer=["llama_cpp", "ik_llama_cpp"])).summary
    assert set(CONTRACT_KEYS) <= s.keys()
    assert all(set(ROW_KEYS) <= row.keys() for row in s["rows"])
    tests = ["ppl16", "pp8", "tg4", "tg4@1", "tg4@3"]
    assert [(row["engine"], row["test"]) for row in s["rows"]] == [(e, t) for t in tests for e in SPEEDS]
    row = s["rows"][0]
    # the first repetition chooses the settings; four are counted: 101, 102, 103, 104 tokens/s
    assert (row["tok_per_s"], row["n"], row["type"]) == (pytest.approx(102.5), 4, "Q8_0")
    assert (row["p10"], row["p90"]) == (pytest.approx(101.3), pytest.approx(103.7))
    assert row["fma_share"] == pytest.approx(102.5 * row["flop_per_token"] / 1e12)
    assert (row["fma_gflops_samples"], row["read_gb_per_s_samples"]) == ([1000.0] * 4, [10.0] * 4)
    assert [ratio["peer"] for ratio in s["ratios"][:2]] == ["llama_cpp", "ik_llama_cpp"]
    assert s["ratios"][0]["ratio"] == pytest.approx(102.5 / 52.5)
    assert s["ratios"][0]["ratio_of_rounds"] == pytest.approx((102 / 52 + 103 / 53) / 2)
    figures = ("fma_gflops", "gemm_gflops", "read_gb_per_s", "open_ms", "ready_s")
    assert [s[key] for key in figures] == [1000.0, 900.0, 10.0, 2.5, 1.5]
    assert s["models"][0]["gemm_share"] == 0.9
    assert (s["ok"], s["exit_code"], s["error"], s["case"] in ("f32", "vnni", "amx")) == (True, 0, None, True)
    json.dumps(s, allow_nan=False)


def test_engines_take_turns_and_the_first_place_goes_round(make, played):
    throughput.run(make(peer=["llama_cpp"], bench=BenchSettings(["prompt"], [8], repeats=3)))
    measured = [(name, slow) for what, name, slow, *_ in played.log if what == "measure"]
    assert measured == [
        ("pagemill", None),  # ours has the settings of the user
        *(("llama_cpp", slow) for slow in (1, 0, 2)),  # a peer's are tried once each
        ("pagemill", None), ("llama_cpp", 0),
        ("llama_cpp", 0), ("pagemill", None),
        ("pagemill", None), ("llama_cpp", 0),
    ]  # fmt: skip
    opened = [entry for entry in played.log if entry[0] == "open"]
    assert {entry[3:] for entry in opened} == {(1, 1, 8, 1)}, "the same threads, cores and context for all"
    names = [entry[:3] for entry in played.log]
    assert names.index(("close", "llama_cpp", 1)) < names.index(("open", "llama_cpp", 2)), "losers end early"
    assert {entry[1:3] for entry in names if entry[0] == "close"} == {entry[1:3] for entry in opened}


def test_rows_are_kept_as_parquet_markdown_and_csv(make, tmp_path):
    asked = make(peer=["llama_cpp"])
    first, second = throughput.run(asked).summary, throughput.run(asked).summary
    assert first["run_key"] == second["run_key"]
    assert throughput.run(make(bench=replace(asked.bench, prompt=[9]))).summary["run_key"] != first["run_key"]
    folder = Path(first["table"])
    assert folder.parent == tmp_path / "results" / "v1" / "table=throughput"
    assert len(list(folder.glob("run-*.parquet"))) == 2, "nothing is overwritten"
    kept = pq.read_table(sorted(folder.iterdir())[0], partitioning=None).to_pylist()
    assert [row["tok_per_s"] for row in kept] == [row["tok_per_s"] for row in first["rows"]]
    assert json.loads(kept[0]["settings"])["bench"]["repeats"] == 4
    assert json.loads(kept[1]["options"]) == {"slow": 0}
    assert [entry["tok_per_s"] for entry in json.loads(kept[1]["tried"])] == [40.0, 50.0, 30.0]
    assert (kept[0]["model_pss_bytes"], kept[0]["anonymous_bytes"], kept[0]["load_s"]) == (11, 22, 0.25)
    with Path(first["csv"]).open() as lines:
        assert [float(row["tok_per_s"]) for row in csv.DictReader(lines)] == [
            row["tok_per_s"] for row in first["rows"]
        ]
    assert "| tiny Q8_0 |" in Path(first["markdown"]).read_text()
    found = results(
        ResultsSettings(
            PathsSettings(str(tmp_path / "results")), Selection("throughput", {"engine": "llama_cpp"})
        )
    )
    assert {row["engine"] for row in found.rows} == {"llama_cpp"}
    assert found.columns[:3] == ["measured_at", "model", "type"]


def test_several_models_are_one_run_with_the_worst_figures(make, tmp_path, monkeypatch):
    tiny_llama(tmp_path / "other.gguf", type_name="Q4_1")
    slow = iter([READY, READY | {"ready_s": 9.0}])
    monkeypatch.setattr(throughput, "ready", lambda *_: dict(next(slow)))
    both = [str(tmp_path / "tiny.gguf"), str(tmp_path / "other.gguf")]
    s = throughput.run(make(model=ModelSettings(""), models=both)).summary
    assert [row["type"] for row in s["rows"]] == ["Q8_0"] * 5 + ["Q4_1"] * 5
    assert [model["ready_s"] for model in s["models"]] == [1.5, 9.0]
    assert s["ready_s"] == 9.0


def test_an_engine_that_fails_leaves_the_others_their_rows(make, played):
    played.fails_at = {"llama_cpp": 2, "ik_llama_cpp": 0}
    s = throughput.run(make(peer=["llama_cpp", "ik_llama_cpp"], bench=BenchSettings(["prompt"], [8]))).summary
    assert (s["ok"], s["exit_code"]) == (False, 3)
    assert [row["engine"] for row in s["rows"]] == ["pagemill"]
    assert s["ratios"] == []
    for told in ("llama_cpp in pp8: llama_cpp fell over", "ik_llama_cpp in pp8"):
        assert told in s["error"]["message"]
    opened, closed = ([entry for entry in played.log if entry[0] == what] for what in ("open", "close"))
    assert {entry[1:3] for entry in opened} == {entry[1:3] for entry in closed}, "no process stays"


def test_a_settings_that_fails_is_not_the_best(make, played, monkeypatch):
    def measure(self, kind, **sizes):
        if self.options.get("slow") == 0:
            raise PlayerError("flash attention is not for this model")
        return FakePlayer.measure(self, kind, **sizes)

    monkeypatch.setattr(rounds, "Player", type("Picky", (FakePlayer,), {"measure": measure}))
    s = throughput.run(make(peer=["llama_cpp"], bench=BenchSettings(["prompt"], [8]))).summary
    assert s["exit_code"] == 0
    assert json.loads(s["rows"][1]["options"]) == {"slow": 1}
    assert "flash attention" in s["rows"][1]["tried"]


def test_an_interrupt_keeps_the_tests_that_are_done(make, played, monkeypatch):
    def measure(self, kind, **sizes):
        if kind == "generate":
            raise KeyboardInterrupt
        return FakePlayer.measure(self, kind, **sizes)

    monkeypatch.setattr(rounds, "Player", type("Stopped", (FakePlayer,), {"measure": measure}))
    asked = make()
    with pytest.raises(KeyboardInterrupt):
        throughput.run(asked)
    (file,) = (Path(asked.paths.results) / "v1" / "table=throughput").rglob("run-*.parquet")
    rows = pq.read_table(file, partitioning=None).to_pylist()
    assert [(row["test"], row["ok"]) for row in rows] == [("ppl16", False), ("pp8", False)]


def test_a_run_is_tracked_with_names_that_mlflow_takes(make, monkeypatch):
    logged = []

    class Tracker:
        warnings = ("told",)

        def log_run(self, *arguments, **options):
            logged.append((arguments, options))
            return "id"

        def close(self):
            logged.append("closed")

    monkeypatch.setattr(throughput, "open_tracker", lambda settings, folder: Tracker())
    s = throughput.run(make(peer=["llama_cpp"])).summary
    assert (s["mlflow_run_id"], s["warnings"]) == ("id", ["told"])
    (name, params, metrics, tags, artifacts), options = logged[0]
    assert logged[1:] == ["closed"]
    assert (name, options["complete"]) == ("throughput of tiny", True)
    assert params["bench"]["repeats"] == 4
    assert metrics["tok_per_s/tg4 x3 pagemill"] == pytest.approx(102.5)
    assert metrics["ratio/ppl16 llama_cpp"] == pytest.approx(102.5 / 52.5)
    assert all(
        set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. /")
        for key in metrics
    )
    assert tags["run_key"] == s["run_key"]
    assert {Path(path).suffix for path in artifacts} == {".parquet", ".md", ".csv"}


def test_a_dry_run_measures_nothing(make, played, tmp_path):
    s = throughput.run(make(dry_run=True, peer=["llama_cpp"])).summary
    assert (s["dry_run"], s["rows"], s["exit_code"]) == (True, [], 0)
    assert [plan["test"] for plan in s["plan"]] == ["ppl16", "pp8", "tg4", "tg4@1", "tg4@3"]
    assert s["plan"][0]["engines"] == ["pagemill", "llama_cpp"]
    assert not played.log
    assert not list((tmp_path / "results").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"model": ModelSettings("")}, r"model\.path is not set; .*models=\[A"),
        ({"models": ["b.gguf"]}, r"both name the model; give one"),
        ({"model": ModelSettings(""), "models": ["a", " "]}, r"model\.path is not set"),
        ({"model": ModelSettings(""), "models": ["a", "a"]}, r"models names a twice"),
        ({"model": ModelSettings("https://host/a.gguf")}, r"is a URL"),
        ({"peer": ["llama_cpp", "llama_cpp"]}, r"peer names llama_cpp twice"),
        ({"bench": BenchSettings(kinds=[])}, r"bench\.kinds=\[\] is empty"),
        ({"bench": BenchSettings(kinds=["promt"])}, r"bench\.kinds=promt .*did you mean prompt\?"),
        ({"bench": BenchSettings(prompt=[])}, r"bench\.prompt=\[\] is empty"),
        ({"bench": BenchSettings(generate=[4, 0])}, r"bench\.generate=\[4, 0\]: 0 is too small"),
        ({"bench": BenchSettings(seqs=[-1])}, r"bench\.seqs=\[-1\]: -1 is too small"),
        ({"bench": BenchSettings(repeats=0)}, r"bench\.repeats=0 is too small; expected 1"),
        ({"bench": BenchSettings(window=2)}, r"bench\.window=2 is too small; expected 3"),
        ({"bench": BenchSettings(windows=0)}, r"bench\.windows=0"),
        ({"engine": EngineSettings(threads=0)}, r"engine\.threads=0"),
        ({"engine": EngineSettings(kv="f23")}, r"did you mean f32\?"),
        ({"engine": EngineSettings(threads=available_cores() + 1)}, r"more than the cores"),
        ({"paths": PathsSettings(" ")}, r"paths\.results is not set"),
        ({"tracking": TrackingSettings("sever")}, r"did you mean server\?"),
    ],
)
def test_each_bad_value_is_refused_before_work(groups, said, make, played):
    with pytest.raises(SettingsError, match=said) as caught:
        throughput.run(make(**groups))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert not played.log


@pytest.mark.parametrize("name", ["lama_cpp", "llama_cpp"])
def test_unknown_and_missing_peers_are_refused(name, make, monkeypatch):
    from importlib import util

    from pipeline.bench.players import check_peers

    monkeypatch.setattr(preflight, "check_peers", check_peers)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    said = "did you mean llama_cpp" if name == "lama_cpp" else r"no Python package llama_cpp"
    with pytest.raises(SettingsError, match=said):
        throughput.run(make(peer=[name]))


def test_a_file_that_is_no_model_is_refused(make, tmp_path):
    (tmp_path / "text.gguf").write_text("vers")
    for name in ("text.gguf", "absent.gguf"):
        with pytest.raises(ModelError, match=name):
            throughput.run(make(model=ModelSettings(str(tmp_path / name))))


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(make, monkeypatch, played):
    monkeypatch.setattr(engine, "footprint", lambda file, *, batch_tokens, **_: 1000 * batch_tokens)
    monkeypatch.setattr(capacity, "available_bytes", lambda: capacity.BASE_BYTES + 500_000)
    with pytest.raises(SettingsError, match=r"the largest that fits is engine\.batch_tokens=500"):
        throughput.run(make())
    assert not played.log
    throughput.run(make(engine=EngineSettings(batch_tokens=500)))


def test_arithmetic_is_counted_from_the_shapes(tmp_path):
    """By hand for a window of 4 and one matrix of each kind."""
    tiny_llama(tmp_path / "t.gguf", width=64, n_heads=4, n_kv_heads=2, ff=96, vocab=300, n_layers=2)
    with engine.open(tmp_path / "t.gguf") as file:
        found = work_of(file)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3  # q, o; k, v; gate, up, down
    assert (found.layers, found.head, found.attended) == (2 * layer, 300 * 64, 2 * 64)
    assert (found.type, found.name) == ("F32", "t")
    assert (found.layers_bytes, found.head_bytes) == (4 * found.layers, 4 * found.head)
    seen = 1 + 2 + 3 + 4
    window = (
        4 * 2 * found.layers + 1 * 2 * found.head + seen * 4 * found.attended
    )  # one token of four is scored
    assert found.flop(Case("perplexity", 4, 0, 3)) == 3 * window
    assert found.flop(Case("prompt", 4, 0, 1)) == window
    assert found.flop(Case("generate", 0, 4, 1)) == window + 3 * 2 * found.head
    steps = 2 * (2 * found.layers + 2 * found.head) + (6 + 7) * 4 * found.attended
    assert found.flop(Case("batched", 5, 2, 8)) == 8 * steps
    whole = found.layers_bytes + found.head_bytes
    assert found.read_bytes(Case("batched", 5, 2, 8), 512) == 2 * whole
    assert found.read_bytes(Case("batched", 5, 2, 8), 4) == 4 * whole
    assert found.read_bytes(Case("perplexity", 4, 0, 3), 8) == 2 * whole
    assert found.read_bytes(Case("prompt", 4, 0, 1), 2) == 2 * found.layers_bytes + found.head_bytes


def test_file_types_are_those_of_llama_cpp():
    theirs = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    theirs.pop(LlamaFileType.GUESSED.value)
    assert theirs == work.FILE_TYPES


def test_cases_cover_every_combination():
    found = work.cases(BenchSettings(prompt=[8, 9], generate=[1, 2], seqs=[1, 4]))
    assert [case.kind for case in found] == [
        "perplexity",
        *["prompt"] * 2,
        *["generate"] * 2,
        *["batched"] * 8,
    ]
    assert [case.kind for case in work.cases(BenchSettings(kinds=["generate"]))] == ["generate"]
    assert {case.kind for case in found} == set(KINDS)


def test_cores_of_their_own_come_first(tmp_path, monkeypatch):
    for cpu, siblings in enumerate(["0-1", "0-1", "2,3", "2,3"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(limits, "_CPUS", tmp_path)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 9})
    assert [limits.pick_cores(n) for n in (1, 2, 3, 4)] == [[0], [0, 2], [0, 2, 9], [0, 1, 2, 9]]


@pytest.mark.parametrize(
    ("features", "case"),
    [
        (["avx2", "fma"], "f32"),
        (["avx512f"], "f32"),
        (["avxvnni"], "vnni"),
        (["avx512vnni"], "vnni"),
        (["amx-int8", "avx512vnni"], "amx"),
    ],
)
def test_the_case_is_what_multiplies_bytes(features, case):
    assert limits.case_of(features) == case


def test_the_machines_own_limits_are_measured(tmp_path):
    before = limits.os.sched_getaffinity(0)
    taken = limits.Limits(1, limits.pick_cores(1))
    with limits.pinned(taken.cores):
        assert limits.os.sched_getaffinity(0) == set(taken.cores)
        assert engine.read_gb_per_s(2, 1 << 22) > 0
    assert limits.os.sched_getaffinity(0) == before
    with engine.open(tiny_llama(tmp_path / "t.gguf", type_name="Q4_1")) as file:
        assert engine.gemm_gflops(file, threads=2, n_tokens=40) > 0


def test_a_fresh_process_tells_its_stages(tmp_path):
    path = str(tiny_llama(tmp_path / "t.gguf", type_name="F32"))
    found = ready(path, str(tmp_path / "cache"), EngineSettings(), repeats=1)
    stages = found["stages"]
    assert tuple(stages) == STAGES
    assert min(stages.values()) > 0
    assert found["ready_s"] == pytest.approx(sum(stages.values()) - stages["imports"])
    assert found["open_ms"] == pytest.approx(stages["open"] * 1e3)
    assert stages["imports"] < 60, "no stage is another clock's"


def test_a_process_that_dies_says_why(tmp_path, monkeypatch):
    path = str(tiny_llama(tmp_path / "t.gguf", type_name="F32"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no numba here')")
    with pytest.raises(PipelineError, match=r"no first likelihoods from a fresh process: .*no numba here"):
        ready(path, str(tmp_path / "cache"), EngineSettings(), repeats=1)
