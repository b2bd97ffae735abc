"""A comparison read back from its tables: which one, its windows, and what else is asked of them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import store, tables
from pipeline.compare import analysis
from pipeline.compare.ladder import smallest_difference
from pipeline.compare.report import binned
from pipeline.compare.report.binned import Targets
from pipeline.errors import StoreError

N_WINDOWS, N_SCORED = 6, 8


def put_comparison(folder: Path, run_key: str, day: int, base: str, exit_code: int = 0) -> None:
    """A comparison of two variants: their rows, and the windows behind the larger one."""
    at = datetime.datetime(2026, 1, day, tzinfo=datetime.UTC)
    rows = [
        {
            "name": name,
            "bytes": n_bytes,
            "base_name": base,
            "base_bytes": 1000,
            "pair_key": pair,
            "finished_at": at,
            "ok": not exit_code,
            "exit_code": exit_code,
            "n_windows": N_WINDOWS - 1,
            "ppl_base": 20.0,
        }
        for name, n_bytes, pair in (("small", 300, "2" * 16), ("large", 700, "1" * 16))
    ]
    path = store.comparison_folder(folder, run_key) / f"run-{day}.parquet"
    path.parent.mkdir(parents=True)
    store.commit(tables.table(rows, tables.COMPARISONS_SCHEMA), path, {})
    pair_folder = store.tokens_folder(folder, "1" * 16)
    pair_folder.mkdir(parents=True, exist_ok=True)
    for first in (0, 4):
        windows = [{"window": w, "n_scored": N_SCORED} for w in range(first, min(first + 4, N_WINDOWS))]
        store.commit(
            tables.table(windows, tables.TOKENS_SCHEMA), pair_folder / f"shard-{first:08d}.parquet", {}
        )


def test_the_latest_complete_comparison_of_a_base_is_read(tmp_path: Path) -> None:
    put_comparison(tmp_path, "a" * 16, 1, "SmolLM2.Q4_1")
    put_comparison(tmp_path, "b" * 16, 2, "mamba")
    put_comparison(tmp_path, "c" * 16, 3, "mamba", exit_code=1)
    put_comparison(tmp_path, "d" * 16, 4, "mamba", exit_code=3)
    assert analysis.read(tmp_path).run_key == "c" * 16, "a broken limit takes no figure away"
    assert analysis.read(tmp_path, bases=["other*", "SmolLM2*", "*"]).run_key == "a" * 16
    assert analysis.read(tmp_path, bases=["other*", "*"]).run_key == "c" * 16
    found = analysis.read(tmp_path, "b" * 16, bases=["other*"])
    assert (found.run_key, found.base["name"], found.base["ppl"]) == ("b" * 16, "mamba", 20.0)
    assert [v["name"] for v in found.variants] == ["large", "small"]
    assert [analysis.saved(v) for v in found.variants] == [300, 700]


def test_windows_are_those_that_the_figures_are_of(tmp_path: Path) -> None:
    put_comparison(tmp_path, "a" * 16, 1, "base")
    comparison = analysis.read(tmp_path)
    assert comparison.windows(comparison.variants[0])["window"].to_pylist() == list(range(N_WINDOWS - 1))
    with pytest.raises(StoreError, match="has 0 windows of small, expected 5") as caught:
        comparison.windows(comparison.variants[1])
    assert "run the comparison again" in caught.value.hint


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no table=comparisons"):
        analysis.read(tmp_path)
    put_comparison(tmp_path, "a" * 16, 1, "base", exit_code=3)
    with pytest.raises(StoreError, match="no complete comparison of \\*") as caught:
        analysis.read(tmp_path)
    assert "pagemill compare" in caught.value.hint
    put_comparison(tmp_path, "b" * 16, 2, "base")
    with pytest.raises(StoreError, match=f"no complete comparison {'f' * 16}"):
        analysis.read(tmp_path, "f" * 16)
    with pytest.raises(StoreError, match="no complete comparison of mamba"):
        analysis.read(tmp_path, bases=["mamba"])


def test_a_variant_will_do_when_both_intervals_end_below_the_tolerance() -> None:
    def variant(n_bytes: int, ln_ratio: float | None, kld: float | None) -> dict[str, Any]:
        return {"bytes": n_bytes, "ln_ratio_high": ln_ratio, "kld_mean_high": kld}

    near = [variant(9, 0.001, 0.002), variant(7, -0.3, 0.009)]
    far = [variant(5, -0.2, 0.02), variant(6, 0.02, 0.001), variant(1, None, None)]
    assert analysis.will_do([*near, *far], 0.01) == near[::-1]


def test_pairing_compares_errors_of_one_logarithm() -> None:
    v = {"ppl": 30.0, "ppl_base": 20.0, "ppl_stderr": 3.0, "ppl_base_stderr": 1.0, "ln_ratio_stderr": 0.01}
    v |= {"ppl_stderr_clustered": 6.0, "ppl_base_stderr_clustered": 3.0, "ln_ratio_stderr_clustered": 0.0}
    found = analysis.pairing(v)
    assert found.unpaired_naive == pytest.approx(np.sqrt(0.1**2 + 0.05**2))
    assert found.gain_naive == pytest.approx(found.unpaired_naive / 0.01)
    assert found.unpaired == pytest.approx(0.25)
    assert found.gain == np.inf, "a variant that is the base"
    assert analysis.pairing(v | {"ln_ratio_stderr": 0.0}).gain_naive == np.inf


def windows(n_windows: int) -> Any:
    """A pair's sums; the variant is 0.02 nats worse, windows differ by 0.5."""
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 60, n_windows)
    base = counts * rng.normal(3.0, 0.5, n_windows)
    return tables.table(
        [
            {"window": w, "n_scored": int(n), "nll_base_sum": b, "nll_sum": b + d}
            for w, (n, b, d) in enumerate(
                zip(counts, base, counts * rng.normal(0.02, 0.05, n_windows), strict=True)
            )
        ],
        tables.TOKENS_SCHEMA,
    )


def test_settling_ends_at_the_figures_of_all_windows() -> None:
    table = windows(200)
    found = analysis.settling(table)
    assert (found.n[0], found.n[-1]) == (2, 200)
    assert len(found.n) <= 60
    sums, counts = analysis.differences(table)
    for at in (0, 17, -1):
        n = int(found.n[at])
        d, c = sums[:n], counts[:n]
        mean = d.sum() / c.sum()
        stderr = np.sqrt(n / (n - 1) * ((d - mean * c) ** 2).sum()) / c.sum()
        assert found.mean[at] == pytest.approx(mean)
        assert found.stderr[at] == pytest.approx(stderr)
        assert found.smallest[at] == pytest.approx(smallest_difference(stderr, n))


@pytest.mark.parametrize("effect", [0.5, 0.02, -0.003])
def test_windows_needed_are_the_fewest_that_see_it(effect: float) -> None:
    per_window = 0.05
    needed = analysis.windows_needed(
        {"ln_ratio_stderr_clustered": per_window / np.sqrt(40), "n_windows": 40}, effect
    )
    assert needed is not None
    assert smallest_difference(per_window / np.sqrt(needed), needed) <= abs(effect)
    if needed > 2:
        fewer = needed - 1
        assert smallest_difference(per_window / np.sqrt(fewer), fewer) > abs(effect)


def test_what_a_million_windows_do_not_see_is_out_of_reach() -> None:
    assert analysis.windows_needed({"ln_ratio_stderr_clustered": 1.0, "n_windows": 40}, 1e-5) is None


def targets(kld: np.ndarray, position: np.ndarray, row: np.ndarray) -> Targets:
    other = np.zeros(kld.size)
    return binned.Targets(row, position, position, other, other, kld, row, row, is_carried=True)


def test_drift_is_the_slope_with_errors_clustered_by_window() -> None:
    """Against the formula in matrices: G / (G - 1) (X'X)^-1 (sum_g X_g' e_g e_g' X_g) (X'X)^-1."""
    rng = np.random.default_rng(1)
    row = np.repeat(np.arange(12), 20)
    position = np.arange(row.size)
    kld = 0.01 + 2e-5 * position + 0.002 * rng.normal(size=12)[row] + 0.001 * rng.normal(size=row.size)
    found = analysis.drift(targets(kld, position, row))
    design = np.stack([np.ones(row.size), position], axis=1)
    bread = np.linalg.inv(design.T @ design)
    beta = bread @ design.T @ kld
    scores = np.array([design[row == g].T @ (kld - design @ beta)[row == g] for g in range(12)])
    covariance = 12 / 11 * bread @ (scores.T @ scores) @ bread
    assert found is not None
    assert found.nats_per_1000_tokens == pytest.approx(1000 * beta[1], rel=1e-9)
    assert found.stderr == pytest.approx(1000 * np.sqrt(covariance[1, 1]), rel=1e-6)
    assert found.p < 0.01


def test_drift_of_noise_is_found_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(2)
    row, position = np.repeat(np.arange(40), 8), np.arange(320)
    found = [
        analysis.drift(targets(rng.exponential(0.01, 320) + 0.003 * rng.normal(size=40)[row], position, row))
        for _ in range(400)
    ]
    assert np.mean([one.p < 0.05 for one in found if one is not None]) == pytest.approx(0.05, abs=0.035)


def test_no_drift_is_known_of_one_window_or_one_position() -> None:
    kld = np.array([0.1, 0.2, 0.3])
    assert analysis.drift(targets(kld, np.arange(3), np.zeros(3, np.int64))) is None
    assert analysis.drift(targets(kld, np.full(3, 7), np.arange(3))) is None
    same = analysis.drift(targets(np.zeros(3), np.arange(3), np.arange(3)))
    assert same == (0.0, 0.0, 1.0)
