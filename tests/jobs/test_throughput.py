"""The throughput job's command line: what composes, what is refused, and what a person is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from jobs import cli, speeds, throughput, usage
from jobs.outcome import COMMON_KEYS
from pipeline import RunResult
from pipeline.bench import calls, report, settings
from pipeline.bench.settings import ThroughputSettings

ROW = {
    "engine": "pagemill",
    "engine_version": "0.1.0",
    "kind": "batched",
    "test": "tg64@8",
    "type": "Q4_1",
    "n_prompt": 512,
    "n_generate": 64,
    "n_seqs": 8,
    "threads": 2,
    "tok_per_s": 120.25,
    "p10": 118.0,
    "p90": 121.0,
    "n": 5,
    "tok_per_s_mean": 119.5,
    "tok_per_s_stdev": 1.25,
    "fma_share": 0.41,
    "read_share": 0.62,
    "options": '{"batch_tokens":4096,"kv":"f32"}',
    "model": "tiny|[x]",
    "model_sha256": "a" * 64,
    "model_bytes": 98_000_000,
    "samples": [118.0, 120.25, 121.0],
    "load_s": None,
}
PEER = ROW | {"engine": "llama_cpp", "tok_per_s": 80.0}
SUMMARY = {
    "job": "throughput",
    "exit_code": 0,
    "rows": [ROW, PEER],
    "ratios": [{**ROW, "peer": "llama_cpp", "ratio": 1.503}],
    "cpu": "AMD EPYC",
    "threads": 2,
    "cores": [0, 1],
    "case": "vnni",
    "fma_gflops": 260.4,
    "gemm_gflops": 210.0,
    "read_gb_per_s": 25.5,
    "models": [
        {
            "model": "tiny|[x]",
            "ready_s": 1.25,
            "ready_stages": {"open": 0.002, "kernels": 0.7},
            "gemm_gflops": 210.0,
            "gemm_share": 0.86,
        }
    ],
    "markdown": "/a/results with spaces/reports/t.md",
    "csv": None,
    "table": "results/v1/table=throughput/run_key=0123456789abcdef",
}


@pytest.fixture
def measured(monkeypatch):
    """Settings that the pipeline was handed; it answers with `SUMMARY`."""
    seen = []

    def run(settings):
        seen.append(settings)
        return RunResult(dict(SUMMARY), [], "", 0)

    monkeypatch.setattr("pipeline.bench.throughput.run", run)
    return seen


def composed(*words: str):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("throughput", overrides=list(words))


def test_the_default_choices_are_the_schemas_defaults() -> None:
    assert throughput.SCHEMA is ThroughputSettings
    assert composed() == OmegaConf.structured(ThroughputSettings)
    assert settings.KINDS == calls.KINDS


def test_a_run_is_one_json_line_and_a_table_for_people(pagemill, measured) -> None:
    words = ("models=[a.gguf,'b c.gguf']", "peer=[llama_cpp]", "bench.seqs=[1,8]", "cluster=inline")
    answer = pagemill("throughput", *words, "tracking=none")
    assert answer.exit_code == 0
    assert answer.stdout.count("\n") == 1
    assert set(COMMON_KEYS) <= answer.line.keys()
    assert answer.line["rows"] == json.loads(json.dumps([ROW, PEER]))
    (s,) = measured
    assert s.paths_of_models == ["a.gguf", "b c.gguf"]
    assert (s.peer, s.bench.seqs, s.bench.prompt, s.bench.repeats) == (["llama_cpp"], [1, 8], [512], 5)
    for told in ("tg64@8", "119.50 ± 1.25", "1.50", "41%", "62%", "VNNI", "results with spaces/reports/t.md"):
        assert told in answer.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "model.path is not set"),
        (["model.path=a", "models=[b]"], "give one"),
        (["model.path=a", "bench.seqs=[]"], "bench.seqs=[] is empty"),
        (["model.path=a", "bench.repeats=0"], "bench.repeats=0"),
        (["model.path=a", "bench.promt=[1]"], "bench.prompt"),
        (["model.path=a", "bench.prompt=many"], "bench.prompt"),
        (["model.path=a", "peer=[llama_ccp]"], "llama_cpp"),
        (["model.path=a", "pear=[llama_cpp]"], "peer"),
        (["model.path=a", "engine.threads=4096"], "cores"),
        (["model.path=absent.gguf"], "absent.gguf"),
    ],
)
def test_bad_words_are_refused_naming_the_nearest(words, told, pagemill) -> None:
    answer = pagemill("throughput", *words)
    assert (answer.exit_code, answer.line["exit_code"], answer.line["ok"]) == (2, 2, False)
    assert told in answer.line["error"]["message"] + (answer.line["error"]["hint"] or "")


def test_help_names_every_key_and_only_its_own_groups() -> None:
    page = usage.text("throughput")
    for key in (
        "cluster.kind=inline",
        "bench.prompt=[512]",
        "bench.windows=8",
        "peer=[]",
        "models=[]",
        "engine.threads=1",
    ):
        assert f"  {key}" in page
    assert "\n  engine\n" in page
    assert "\n  protocol\n" not in page
    assert max(map(len, page.splitlines())) <= 110
    assert "throughput" in cli.JOBS


def test_completion_offers_its_keys(monkeypatch, capsys) -> None:
    line = "pagemill throughput bench."
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert cli.run(["-sc", "query=bash"]) == 0
    assert {"bench.repeats=", "bench.window="} <= set(capsys.readouterr().out.split())


def shown(summary, width: int = 200) -> str:
    text = io.StringIO()
    speeds.show(summary, Console(file=text, width=width, highlight=False))
    return text.getvalue()


def test_the_table_names_model_test_speed_and_shares() -> None:
    text = shown(SUMMARY)
    ours, peer = (line for line in text.splitlines() if "tg64@8" in line)
    assert "tiny|[x] Q4_1, 98.0 MB, 2 threads" in text, "brackets are text, not markup"
    assert "pagemill" in ours
    assert "1.50" in peer
    assert "1.50" not in ours
    assert "kernels 700" in text
    assert "86% of the ceiling" in text
    for width in (20, 60):
        assert "119.50" in "".join(shown(SUMMARY, width).split())
    nothing = SUMMARY | {"rows": [], "ratios": [], "models": [], "fma_gflops": None, "markdown": None}
    plan = [{"model": "m", "test": "pp512", "engines": ["pagemill", "llama_cpp"], "repeats": 5}]
    assert "m pp512: pagemill, llama_cpp" in shown(nothing | {"plan": plan})


def test_markdown_and_csv_say_the_same_as_the_rows(tmp_path: Path) -> None:
    page = report.markdown(SUMMARY, "Throughput of tiny")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") - line.count("\\|") for line in lines} == {len(report.HEADINGS) + 1}
    assert "batch_tokens=4096" in page
    header, first, _ = report.comma_separated(SUMMARY["rows"]).splitlines()
    assert header.split(",")[:3] == ["engine", "engine_version", "kind"]
    assert "120.25" in first
    assert '"[118.0, 120.25, 121.0]"' in first
    assert report.comma_separated([]) == "\n"
