"""A base and its variants, inline on a fake engine: pairs, resuming, stopping, limits, refusals.

The real engine is in test_compare_engine.py, killed processes in tests/jobs/test_compare.py.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_comparison import BROKEN, install, targets_of, write_model

from pipeline import metrics, results
from pipeline.compare import compare, run
from pipeline.compare.sequence import visiting_order
from pipeline.compare.settings import FIGURES, CompareSettings, StopSettings
from pipeline.compare.statistics import figures
from pipeline.errors import ModelError, SettingsError, StoreError
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.tables import TOKENS_SCHEMA

TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 16
N_WINDOWS = 24
CONTRACT_KEYS = (
    "job ok exit_code error run_key measure_key table mlflow_run_id wall_s compile_s load_s version numerics "
    "warnings base variants report overhead"
).split()
VARIANT_KEYS = (
    "name type bytes bpw ppl ln_ratio ln_ratio_stderr ln_ratio_stderr_clustered corr kld_mean kld_stderr "
    "kld_p50 kld_p90 kld_p99 kld_p999 kld_max dp_mean dp_rms same_top p_vs_next n_windows stopped"
).split()
LEVELS = {"high": 1, "middle": 4, "low": 16}


@pytest.fixture
def fake(monkeypatch):
    """The fake comparison's class, installed; no page is written."""
    monkeypatch.setattr(
        "pipeline.compare.report.write", lambda summary, pairs, folder, tokenizer: folder / "x.html"
    )
    return install(monkeypatch)


@pytest.fixture
def make(tmp_path, fake):
    """Settings of a small inline comparison; groups can be replaced."""
    write_model(tmp_path / "base.gguf", 0, 9000)
    for name, level in LEVELS.items():
        write_model(tmp_path / f"{name}.gguf", level, 5000 - 100 * level)
    (tmp_path / "t.txt").write_text(TEXT)

    def settings(results="results", variants=("low", "high", "middle"), per_shard=8, **groups):
        return CompareSettings(
            **{
                "base": ModelSettings(str(tmp_path / "base.gguf")),
                "variants": [str(tmp_path / f"{name}.gguf") for name in variants],
                "data": DataSettings(path=str(tmp_path / "t.txt")),
                "protocol": ProtocolSettings(window=32, limit=N_WINDOWS),
                "cluster": ClusterSettings("inline", windows_per_shard=per_shard),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


def direct(level):
    return targets_of(level, TEXT, N_WINDOWS)


def bits(summary):
    return [(v["name"], v["nll_sha256"], v["kld_sha256"]) for v in summary["variants"]]


def figures_of(variant):
    return {name: variant[name] for name in FIGURES}


def rows(summary, name):
    variant = next(v for v in summary["variants"] if v["name"] == name)
    found = [
        pq.read_table(path, partitioning=None) for path in sorted(Path(variant["table"]).glob("shard-*"))
    ]
    return [row for table in found for row in table.to_pylist()]


def inodes(summary):
    return {
        path: path.stat().st_ino
        for v in summary["variants"]
        for path in Path(v["table"]).glob("shard-*.parquet")
    }


def test_result_equals_the_definition_and_has_every_key(make):
    result = compare(make())
    s = result.summary
    assert set(CONTRACT_KEYS) <= s.keys()
    assert [v["name"] for v in s["variants"]] == ["high", "middle", "low"], "the largest first"
    for v in s["variants"]:
        assert set(VARIANT_KEYS) <= v.keys()
        expected = figures(direct(LEVELS[v["name"]]))
        assert {name: v[name] for name in expected} == expected
        assert (v["n_windows"], v["stopped"]) == (N_WINDOWS, False)
    assert s["variants"][-1]["p_vs_next"] is None
    assert s["variants"][0]["p_vs_next"] < 1e-3
    assert s["base"]["ppl"] == s["variants"][0]["ppl_base"]
    assert (s["exit_code"], s["shards_done"], s["shards_reused"], s["n_workers"]) == (0, 9, 0, 1)
    assert s["report"].endswith("x.html")
    json.dumps(s, allow_nan=False)


def test_every_figure_can_be_limited_and_stands_in_the_table(make):
    s = compare(make()).summary
    assert set(figures(direct(1))) - {"n_windows", "n_scored"} == set(FIGURES)
    (file,) = Path(s["table"]).glob("run-*.parquet")
    table = pq.read_table(file, partitioning=None).to_pylist()
    assert [row["name"] for row in table] == ["high", "middle", "low"]
    for row, v in zip(table, s["variants"], strict=True):
        assert figures_of(row) == figures_of(v)
        assert (row["bytes"], row["pair_key"], row["base_name"]) == (v["bytes"], v["pair_key"], "base")


def test_rows_hold_every_target_and_both_subjects(make):
    s = compare(make(variants=("middle",))).summary
    found, targets = rows(s, "middle"), direct(LEVELS["middle"])
    assert [row["window"] for row in found] == list(range(N_WINDOWS))
    assert np.concatenate([row["nll"] for row in found]).tolist() == targets.nll.tolist()
    assert np.concatenate([row["kld"] for row in found]).tolist() == targets.kld.tolist()
    for row in found:
        assert row["n_scored"] == len(row["nll_base"]) == len(row["top"])
        assert row["n_same_top"] == sum(a == b for a, b in zip(row["top"], row["top_base"], strict=True))
        assert row["nll_cross_sum"] == math.fsum((np.array(row["nll"]) * np.array(row["nll_base"])).tolist())
        assert row["first_scored"] == row["first_token"] + 17
        assert row["base_model_sha256"] == s["base"]["model_sha256"] != row["variant_model_sha256"]
        assert row["kld_keys"] is None
        assert row["measure_key"] == s["measure_key"]
    assert pq.read_schema(next(iter(inodes(s)))).names == TOKENS_SCHEMA.names


@pytest.mark.parametrize(("per_shard", "batch_tokens"), [(7, 4096), (1000, 13)])
def test_bits_independent_of_shards_and_batch(make, per_shard, batch_tokens):
    first = compare(make()).summary
    other = compare(
        make("other", per_shard=per_shard, engine=EngineSettings(batch_tokens=batch_tokens))
    ).summary
    assert bits(other) == bits(first)
    assert [figures_of(v) for v in other["variants"]] == [figures_of(v) for v in first["variants"]]
    assert other["run_key"] == first["run_key"]


def test_adding_a_variant_computes_that_variant_alone(make, fake):
    first = compare(make(variants=("low", "high"))).summary
    before, tokens = inodes(first), fake.tokens
    fake.opened.clear()
    second = compare(make()).summary
    assert fake.tokens - tokens == N_WINDOWS * 32 * 2, "base and one variant"
    assert fake.opened == [["base.gguf", "middle.gguf"]]
    assert before.items() <= inodes(second).items()
    assert second["shards_reused"] == len(before)
    kept = {v["name"]: v for v in second["variants"]}
    for v in first["variants"]:
        assert figures_of(kept[v["name"]]) == figures_of(v)
        assert kept[v["name"]]["pair_key"] == v["pair_key"]
    assert second["run_key"] != first["run_key"]
    assert bits(second) == bits(compare(make("new")).summary)


def test_a_resumed_comparison_computes_what_is_missing_of_each_pair(make, fake):
    first = compare(make()).summary
    tables = {v["name"]: Path(v["table"]) for v in first["variants"]}
    for name, shard in (("low", 0), ("low", 8), ("high", 8), ("middle", 16)):
        (tables[name] / f"shard-{shard:08d}.parquet").unlink()
    tokens = fake.tokens
    fake.opened.clear()
    second = compare(make()).summary
    assert fake.tokens - tokens == 8 * 32 * (2 + 3 + 2), "each shard with the pairs that lack it"
    assert sorted(len(opened) for opened in fake.opened) == [2, 2, 3]
    assert bits(second) == bits(first)
    assert (second["shards_done"], second["shards_reused"]) == (9, 5)


def test_a_pair_keeps_the_shards_that_it_was_begun_with(make, fake):
    first = compare(make(variants=("low",), per_shard=5)).summary
    second = compare(make()).summary
    assert any("ignored for low: it was begun with 5" in warning for warning in second["warnings"])
    assert second["shards_reused"] == first["shards_done"] == 5
    assert bits(second) == bits(compare(make("new")).summary)


def test_without_targets_sums_are_the_same_and_percentiles_near(make):
    kept, sketched = compare(make()).summary, compare(make(keep_tokens=False)).summary
    assert bits(kept) == bits(sketched)
    assert kept["run_key"] != sketched["run_key"], "what is kept is another table"
    for one, other in zip(kept["variants"], sketched["variants"], strict=True):
        for name in FIGURES:
            if name.startswith(("kld_p", "dp_p")):
                assert other[name] == pytest.approx(one[name], rel=2**-6, abs=1e-4)
            else:
                assert other[name] == one[name]
    for row in rows(sketched, "low"):
        assert row["nll"] is row["kld"] is row["top"] is None
        assert sum(row["nll_diff_counts"]) == sum(row["kld_counts"]) == row["n_scored"]


def test_documents_hand_their_states_on_whatever_the_shards(make, tmp_path, fake):
    (tmp_path / "a.txt").write_text(TEXT[:300])
    (tmp_path / "b.txt").write_text(TEXT[:200])
    groups = {
        "data": DataSettings(files=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]),
        "protocol": ProtocolSettings("carry", 32),
    }
    for name, level in {"base": 0, **LEVELS}.items():
        path = tmp_path / f"{name}.gguf"
        write_model(path, level, path.stat().st_size)
        path.write_bytes(path.read_bytes().replace(b"GGUF\0\0\0\0", b"GGUFmamb"))
    whole = compare(make("whole", per_shard=1000, **groups)).summary
    tokens = fake.tokens
    parts = compare(make("parts", per_shard=2, **groups)).summary
    assert bits(parts) == bits(whole)
    assert fake.tokens - tokens == tokens, "no token was read twice"
    assert not list(Path(parts["table"]).glob(".states*"))
    shard = sorted(Path(parts["variants"][0]["table"]).glob("shard-*"))[2]
    shard.unlink()
    assert bits(compare(make("parts", per_shard=2, **groups)).summary) == bits(whole), (
        "read again from the start"
    )


def test_stopping_depends_on_window_order_alone(make, fake):
    stop = StopSettings("decided")
    full = compare(make("full")).summary
    found = [compare(make(f"r{n}", per_shard=n, stop=stop)).summary for n in (4, 1000)]
    n = found[0]["n_windows"]
    assert 16 <= n < N_WINDOWS
    assert all(s["stopped"] for s in found)
    assert (
        len({json.dumps([bits(s), s["n_windows"], [figures_of(v) for v in s["variants"]]]) for s in found})
        == 1
    )
    groups = np.split(np.arange(N_WINDOWS), range(4, N_WINDOWS, 4))
    taken = np.concatenate([groups[i] for i in visiting_order(len(groups))])[:n]
    for v, whole in zip(found[0]["variants"], full["variants"], strict=True):
        assert (v["n_windows"], v["stopped"]) == (n, True)
        paths = sorted(Path(whole["table"]).glob("*.parquet"))
        rows = [pq.read_table(path, columns=["nll_sum"], partitioning=None) for path in paths]
        sums = np.concatenate([part.column("nll_sum").to_numpy() for part in rows])[np.sort(taken)]
        assert v["nll_sha256"] == metrics.nll_sha256(sums), "the windows before the stopping point, no others"
        assert v["ppl"] == pytest.approx(np.exp(sums.sum() / v["n_scored"]), rel=1e-12)
    assert max(v["decided_at"] for v in found[0]["variants"][:-1]) == n
    assert found[0]["shards_done"] == 3 * -(-n // 4), "no more shards were handed out"
    other = compare(make("seed", stop=stop, seed=1)).summary
    assert other["variants"][0]["nll_sha256"] != found[0]["variants"][0]["nll_sha256"], "drawn by seed"
    tokens = fake.tokens
    assert bits(compare(make("full", stop=stop)).summary) == bits(found[0])
    assert bits(compare(make("r4", stop=stop, per_shard=4)).summary) == bits(found[0])
    assert fake.tokens == tokens, "what is decided already starts no worker"


def test_a_single_variant_is_decided_against_its_base(make):
    s = compare(make(variants=("low",), per_shard=1, stop=StopSettings("decided"))).summary
    assert (s["stopped"], s["variants"][0]["decided_at"]) == (True, s["n_windows"])


def test_neighbours_that_nothing_tells_apart_take_all_windows(make, tmp_path):
    write_model(tmp_path / "twin.gguf", LEVELS["low"], 5000)
    s = compare(make(variants=("low", "twin"), stop=StopSettings("decided"))).summary
    assert (s["stopped"], s["n_windows"], s["shards_done"]) == (False, N_WINDOWS, 6)
    assert [v["p_vs_next"] for v in s["variants"]] == [1, None]


def test_a_broken_limit_is_exit_code_1(make):
    result = compare(make(limits={"kld_mean": 0.05, "same_top": ">=0.8", "ppl": "<1e9"}))
    s = result.summary
    assert (result.exit_code, s["ok"], s["error"]["type"]) == (1, False, "LimitBroken")
    broken = {(b["variant"], b["metric"]): b for b in s["limits_broken"]}
    assert set(broken) == {("low", "kld_mean"), ("low", "same_top")}
    low = s["variants"][-1]
    assert broken["low", "kld_mean"] == {
        "variant": "low", "metric": "kld_mean", "value": low["kld_mean"], "limit": "<= 0.05",
    }  # fmt: skip
    assert f"low: kld_mean is {low['kld_mean']:.6g}, expected <= 0.05" in s["error"]["message"]
    assert low["ppl"] is not None
    kept = compare(make(limits={"kld_mean": 1, "same_top": 0.5}))
    assert (kept.exit_code, kept.summary["limits_broken"]) == (0, [])


def test_the_base_as_a_variant_is_the_floor(make, tmp_path):
    s = compare(make(variants=("base", "low"))).summary
    assert any("base is the base itself: this is the floor" in warning for warning in s["warnings"])
    floor = s["variants"][0]
    assert (floor["kld_mean"], floor["ln_ratio"], floor["same_top"]) == (0, 0, 1)


def test_variants_of_the_same_content_are_run_once(make, tmp_path, fake):
    (tmp_path / "copy.gguf").write_bytes((tmp_path / "low.gguf").read_bytes())
    s = compare(make(variants=("low", "copy", "low"))).summary
    assert [v["name"] for v in s["variants"]] == ["low"]
    assert any("copy.gguf has the same content as" in w and "run once, as low" in w for w in s["warnings"])
    assert fake.opened == [["base.gguf", "low.gguf"]]


def test_scores_that_are_no_numbers_are_named_and_the_rest_is_kept(make, tmp_path):
    write_model(tmp_path / "nan.gguf", BROKEN, 4000)
    result = compare(make(variants=("low", "nan")))
    s = result.summary
    assert result.exit_code == 3
    assert "of nan.gguf at position 20 is nan" in s["error"]["message"]
    assert "shard-00000000.parquet of nan: ScoreError: window 0" in s["error"]["message"]
    nan, low = s["variants"]
    assert (nan["name"], nan["ppl"], nan["kld_mean"]) == ("nan", None, None)
    assert figures_of(low) == figures_of(compare(make("alone", variants=("low",))).summary["variants"][0])
    assert s["report"] is None
    assert compare(make(variants=("low",))).summary["n_workers"] == 0, "its rows were published"


def test_a_dry_run_starts_and_writes_nothing(make, fake):
    s = compare(make(dry_run=True)).summary
    assert (s["dry_run"], s["shards_todo"], [v["ppl"] for v in s["variants"]]) == (True, 9, [None] * 3)
    assert fake.opened == []
    assert not Path(s["table"]).exists()
    run_key = s["run_key"]
    assert compare(make()).summary["run_key"] == run_key


def test_a_report_that_fails_costs_a_warning(make, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("pipeline.compare.report.write", fail)
    s = compare(make()).summary
    assert (s["exit_code"], s["report"]) == (0, None)
    assert any("no report: RuntimeError: no fonts" in warning for warning in s["warnings"])


def test_the_report_gets_rows_tokens_and_names(make, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "pipeline.compare.report.write",
        lambda summary, pairs, folder, tokenizer: (
            seen.append((summary, pairs, tokenizer)) or folder / "r.html"
        ),
    )
    s = compare(make(stop=StopSettings("decided"))).summary
    ((summary, pairs, tokenizer),) = seen
    assert summary["variants"] == s["variants"]
    assert [(pair.name, pair.windows.num_rows) for pair in pairs.pairs] == [
        (v["name"], v["n_windows"]) for v in s["variants"]
    ]
    assert pairs.base == "base"
    assert tokenizer.decode(pairs.tokens[1:4]) == b"The"


def test_mlflow_gets_a_parent_and_a_child_per_variant(make, monkeypatch):
    calls = []

    class Tracker:
        warnings: list[str] = []  # noqa: RUF012

        def prepare(self):
            calls.append(("prepare",))

        def log_run(self, name, params, metrics, tags, *args, parent=None, stays_open=False, **_):
            calls.append(("run", name, parent, stays_open, dict(metrics), dict(tags)))
            return f"id of {name}"

        def end_run(self, run_id, metrics, artifacts=(), *, complete=True):
            calls.append(("end", run_id, complete, [Path(path).name for path in artifacts], dict(metrics)))

        def close(self):
            calls.append(("close",))

    monkeypatch.setattr(run, "open_tracker", lambda settings, results: Tracker())
    s = compare(make()).summary
    kinds = [call[0] for call in calls]
    assert kinds == ["prepare", "run", "run", "run", "run", "end", "close"]
    parent, *children = (call for call in calls if call[0] == "run")
    assert s["mlflow_run_id"] == f"id of {parent[1]}"
    assert parent[3] is True
    for child, v in zip(children, s["variants"], strict=True):
        assert (child[1], child[2]) == (v["name"], s["mlflow_run_id"])
        assert child[4]["kld_mean"] == v["kld_mean"]
        assert child[5]["run_key"] == v["pair_key"]
    end = calls[-2]
    assert (end[1], end[2]) == (s["mlflow_run_id"], True)
    assert any(name.startswith("run-") for name in end[3])


@pytest.mark.parametrize(("table", "n"), [("tokens", 3 * N_WINDOWS), ("comparisons", 3)])
def test_results_reads_both_tables(make, table, n):
    settings = make()
    compare(settings)
    compare(settings)
    found = results.results(
        results.ResultsSettings(PathsSettings(settings.paths.results), results.Selection(table=table))
    )
    assert len(found.rows) == n, "of several runs the last"
    if table == "comparisons":
        assert [row["name"] for row in found.rows] == ["high", "middle", "low"]
    else:
        every = results.ResultsSettings(
            PathsSettings(settings.paths.results),
            results.Selection(table=table, columns=["*"], limit=1, format="json"),
        )
        assert len(json.loads(results.results(every).text)[0]["nll"]) == 15


def test_rows_of_another_measure_are_refused(make):
    s = compare(make()).summary
    path = Path(s["variants"][0]["table"]) / "plan.json"
    plan = json.loads(path.read_text())
    plan["measure"]["protocol_window"] = 64
    path.write_text(json.dumps(plan))
    with pytest.raises(StoreError, match="another measure: protocol_window is 64, expected 32") as caught:
        compare(make())
    assert caught.value.exit_code == 2


def test_a_variant_that_is_nothing_is_refused(make, tmp_path, fake):
    with pytest.raises(SettingsError, match=r"Q4_K_X is neither a file .*did you mean q4_k"):
        compare(dataclasses.replace(make(), variants=["Q4_K_X"]))
    with pytest.raises(SettingsError, match="variants: IQ3_XXS: its tensor types can be read but") as caught:
        compare(dataclasses.replace(make(), variants=["IQ3_XXS"]))
    assert "nearest mixture that can be written is Q2_K" in caught.value.hint
    with pytest.raises(ModelError, match=r"none\.gguf") as caught:
        compare(make(variants=("low", "none")))
    assert "every variant is a GGUF file or a type" in caught.value.hint
    (tmp_path / "text.gguf").write_bytes(b"some text")
    with pytest.raises(ModelError, match=r"text\.gguf"):
        compare(make(variants=("low", "text")))
    with pytest.raises(ModelError, match="absent") as caught:
        compare(dataclasses.replace(make(), base=ModelSettings(str(tmp_path / "absent.gguf"))))
    assert "base.path" in caught.value.hint
    assert fake.opened == []
