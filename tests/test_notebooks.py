"""Notebooks are readers of result tables, kept without their outputs, and run on tables of a real model."""

from __future__ import annotations

import os
import pydoc_data.topics
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import regressions

from pipeline import store
from pipeline.regression import record

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MAMBA = Path(__file__).parent / "data/mamba-tiny-q8_0.gguf"
RULES = {  # of those in 03_mamba_bits.ipynb; the others would only take time
    "ssm_in": ["ssm_in=Q4_0"],
    "ssm_dt": ["ssm_dt=BF16"],
    "token_embd": ["token_embd=Q4_0"],
    "all": ["ssm_dt=BF16", "ssm_|token_embd=Q4_0"],
}
WINDOW, N_WINDOWS = 64, 20


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_outputs_are_stripped(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_opens_with_its_question_and_the_command_of_its_table(file: Path) -> None:
    first, second = nbformat.read(file, as_version=4).cells[:2]
    assert first.cell_type == second.cell_type == "markdown"
    assert "?" in first.source
    assert os.linesep + "    " in second.source or "```" in second.source
    assert "make demo" in second.source or "pagemill" in second.source


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_conclusion_holds_for_any_table(file: Path) -> None:
    """What depends on the table is computed in the cell before; the words have no figure in them."""
    *_, computed, said = nbformat.read(file, as_version=4).cells
    assert (computed.cell_type, said.cell_type) == ("code", "markdown")
    assert "print(" in computed.source
    assert said.source.startswith("**Conclusion.**")
    assert not re.search(r"\d", said.source)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one comparison of the small Mamba in the checkout, and of one run of it."""
    pytest.importorskip("matplotlib", reason="the extra `notebooks` is not installed")
    from pipeline import evaluate
    from pipeline.compare import compare
    from pipeline.compare.settings import CompareSettings
    from pipeline.quantize import quantize
    from pipeline.quantize.settings import QuantizeChoices, QuantizeSettings
    from pipeline.settings import (
        ClusterSettings,
        DataSettings,
        ModelSettings,
        PathsSettings,
        PerplexitySettings,
        ProtocolSettings,
        TrackingSettings,
    )

    folder = tmp_path_factory.mktemp("notebooks")
    text = "\n".join(pydoc_data.topics.topics.values())
    (folder / "t.txt").write_text(text[: 6 * WINDOW * N_WINDOWS], encoding="utf-8")
    model = ModelSettings(str(MAMBA))
    for name, rules in RULES.items():
        choices = QuantizeChoices("Q8_0", str(folder / f"{name}.gguf"), None, rules, allow_requantize=True)
        quantize(QuantizeSettings(model, choices))
    asked: dict[str, Any] = {
        "data": DataSettings("pydoc", str(folder / "t.txt")),
        "cluster": ClusterSettings("inline", windows_per_shard=N_WINDOWS),
        "tracking": TrackingSettings("none"),
        "paths": PathsSettings(str(folder / "results"), str(folder / "cache")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.compare.report.write", lambda *_, **__: folder / "no report is needed here")
        variants = [str(folder / f"{name}.gguf") for name in RULES]
        protocol = ProtocolSettings("carry", WINDOW, N_WINDOWS)
        compared = compare(CompareSettings(base=model, variants=variants, protocol=protocol, **asked))
    evaluated = evaluate(PerplexitySettings(model=model, protocol=ProtocolSettings(window=WINDOW), **asked))
    assert compared.exit_code == evaluated.exit_code == 0
    return folder / "results"


@pytest.fixture
def executed(tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a notebook's cells in this process, as a kernel takes seconds to start.

    Returns what it named, what it said, and how many figures it drew.
    """
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PAGEMILL_RESULTS", str(tables))
    monkeypatch.delenv("PAGEMILL_COMPARISON", raising=False)
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")

    def run(begin: str) -> tuple[dict[str, Any], str, int]:
        (file,) = (file for file in NOTEBOOKS if file.name.startswith(begin))
        names: dict[str, Any] = {"__name__": "__main__"}
        for place, cell in enumerate(nbformat.read(file, as_version=4).cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{file.name}, cell {place}", "exec"), names)
        n_figures = len(plt.get_fignums())
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        return names, capsys.readouterr().out, n_figures

    yield run
    plt.close("all")


def test_first_run(executed) -> None:
    names, said, n_figures = executed("00")
    assert n_figures == 1
    assert f"perplexity {names['run']['ppl']:.4f}" in said


def test_quant_ladder_ships_the_smallest_that_will_do(executed) -> None:
    names, said, n_figures = executed("01")
    assert n_figures == 1
    assert {v["name"] for v in names["variants"]} == set(RULES)
    bounds = {v["name"]: max(v["ln_ratio_high"], v["kld_mean_high"]) for v in names["variants"]}
    near = [v for v in names["variants"] if bounds[v["name"]] < names["TOLERANCE"]]
    assert near, "or the table shows nothing"
    assert names["ship"]["name"] == min(near, key=lambda v: v["bytes"])["name"]
    assert f"ship {names['ship']['name']}" in said
    others = {v["name"]: (v["bytes"], v["kld_mean"]) for v in names["variants"]}
    for v in names["variants"]:
        size, kld = others[v["name"]]
        assert (v in names["front"]) != any(s <= size and k < kld for s, k in others.values())


def test_paired_statistics_are_those_of_the_targets(executed) -> None:
    """Against sums over the targets themselves, by NumPy."""
    names, said, n_figures = executed("02")
    assert n_figures == 5
    near = names["near"]
    table = names["comparison"].windows(near)
    nll, base = ([np.array(row) for row in table[name].to_pylist()] for name in ("nll", "nll_base"))
    n = sum(map(len, nll))
    counts, sums = np.array([len(x) for x in nll]), np.array([(x - y).sum() for x, y in zip(nll, base)])  # noqa: B905

    def clustered(sums: np.ndarray) -> float:
        residuals = sums - sums.sum() / n * counts
        return float(np.sqrt(sums.size / (sums.size - 1) * (residuals**2).sum()) / n)

    alone = [clustered(np.array([x.sum() for x in side])) for side in (nll, base)]
    found = names["worth"][near["name"]]
    assert found.paired == pytest.approx(clustered(sums), rel=1e-9)
    assert found.gain == pytest.approx(np.hypot(*alone) / clustered(sums), rel=1e-9)
    flat = [np.concatenate(side) for side in (nll, base)]
    naive = np.hypot(*(x.std(ddof=1) for x in flat)) / (flat[0] - flat[1]).std(ddof=1)
    assert found.gain_naive == pytest.approx(naive, rel=1e-6)
    assert f"{near['name']}: pairing makes the error {found.gain:,.0f} times smaller" in said
    assert names["bounded"].any(), "enough windows for a confidence sequence"


def test_mamba_bits_ranks_by_divergence_per_byte(executed) -> None:
    (file,) = (file for file in NOTEBOOKS if file.name.startswith("03"))
    command = nbformat.read(file, as_version=4).cells[1].source
    assert all(rule in command for rules in RULES.values() for rule in rules)
    names, said, n_figures = executed("03")
    assert n_figures == 2
    by_name = {v["name"]: v for v in names["variants"]}
    ranked = sorted(
        ("ssm_in", "token_embd"),
        key=lambda name: -by_name[name]["kld_mean"] / (MAMBA.stat().st_size - by_name[name]["bytes"]),
    )
    assert names["ranking"] == ranked
    assert "no bytes are saved in ssm_dt" in said
    assert by_name["all"]["kld_mean"] > max(by_name[name]["kld_mean"] for name in ranked)
    assert set(names["drifts"]) == set(RULES)
    assert names["targets"].is_carried


def test_history_without_runs_is_made_up_and_says_so(executed) -> None:
    names, said, n_figures = executed("04")
    assert n_figures == 1
    assert "no run of suite smoke is recorded" in said
    assert all(axis.get_title("left").startswith("MADE UP: ") for axis in names["axes"].flat)
    assert [len(found.changes) for found in names["found"]] == [1, 3]


def test_history_marks_the_changes_of_recorded_runs(
    executed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(8):
        when = regressions.TODAY + timedelta(days=at)
        run = replace(regressions.passed(), provenance=regressions.provenance(when, version=f"0.{at // 5}"))
        if at >= 5:
            run = replace(run, measured=regressions.measured(moved={3: 0.5}))
        record.write(store.regressions_folder(tmp_path, run.run_key), run)
    monkeypatch.setenv("PAGEMILL_RESULTS", str(tmp_path))
    names, said, n_figures = executed("04")
    assert n_figures == 1
    assert "MADE UP" not in said
    assert "8 runs from 2026-11-22 to 2026-11-29, 7 figures" in said
    assert {found.id[:4]: found.changes for found in names["found"] if found.changes} == {
        ("pydoc", "tiny", "pydoc", "ppl"): [5]
    }
    assert len(names["lines"]) == 1
    assert "version 0.0 → 0.1" in names["lines"][0]
    assert "2026-11-27 03:00: pydoc ppl" in said
