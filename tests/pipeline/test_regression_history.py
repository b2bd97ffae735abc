"""The history of a suite: what is read from its records, and where a figure changed its level."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from regressions import TODAY, measured, passed, past, provenance

from pipeline import store
from pipeline.regression import history, record
from pipeline.regression.history import LEAST, change_points

NOISES = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "heavy tails": lambda rng, n: rng.standard_t(3, n) / 3**0.5,
    "skew": lambda rng, n: rng.exponential(1, n),
}


@pytest.mark.parametrize("name", NOISES)
def test_one_in_twenty_series_without_a_change_gets_one_at_most(name: str) -> None:
    rng = np.random.default_rng(1)
    speeds = [0.8 * np.exp(0.07 * NOISES[name](rng, 60)) for _ in range(1000)]
    assert sum(bool(change_points(values)) for values in speeds) <= 50


def test_young_series_are_as_careful() -> None:
    rng = np.random.default_rng(2)
    for n in (LEAST, 10, 20):
        assert sum(bool(change_points(np.exp(rng.normal(0, 0.07, n)))) for _ in range(400)) <= 20


@pytest.mark.parametrize(
    ("noise", "levels", "least"), [(0.05, (1, 0.8, 1, 0.8), 0.98), (0.1, (1, 0.6, 0.9, 0.6), 0.9)]
)
def test_three_planted_changes_are_found_within_two_runs(
    noise: float, levels: tuple[float, ...], least: float
) -> None:
    planted, found = np.array([15, 30, 45]), []
    for seed in range(200):
        values = np.repeat(levels, 15) * np.exp(np.random.default_rng(seed).normal(0, noise, 60))
        places = change_points(values)
        found.append(len(places) == 3 and np.abs(np.array(places) - planted).max() <= 2)
    assert np.mean(found) >= least


def test_a_figure_that_keeps_its_bits_changes_wherever_they_do() -> None:
    assert change_points([20.5] * 9) == []
    assert change_points([20.5] * 5 + [20.500000000000004] + [20.5] * 3) == [5, 6]
    assert change_points([20.5, 20.5, 19.0]) == [2]
    assert change_points([0.0] * 6 + [0.01]) == [6]
    assert change_points([]) == change_points([1.0]) == change_points([1.0, 2.0]) == []


def test_noise_is_not_judged_before_there_are_enough_runs() -> None:
    noisy = [1.0, 1.01, 0.99, 2.0, 2.01, 1.99, 2.02]
    assert change_points(noisy[: LEAST - 1]) == []
    assert change_points(noisy) == [3]


def test_one_bad_night_is_no_change_and_unknown_values_are_passed_over() -> None:
    values = np.exp(np.random.default_rng(3).normal(0, 0.05, 40))
    bad = values.copy()
    bad[[11, 39]] /= 3
    assert change_points(bad) == []
    stepped = values * np.repeat([1.0, 0.5], 20)
    stepped[[0, 7, 22]] = np.nan
    assert change_points(stepped) == [20]


def test_neither_unit_nor_direction_matter() -> None:
    values = np.repeat([1.0, 0.8, 1.1], 12) * np.exp(np.random.default_rng(4).normal(0, 0.03, 36))
    assert change_points(values) == change_points(1e9 * values) == [12, 24]
    assert change_points(-values) == [12, 24]  # without logarithms
    assert change_points(1e-9 * values - 5) == [12, 24]


def test_stretches_are_as_good_as_those_of_ruptures_where_no_loss_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then it is least squares, whose optimum PELT finds; levels that are values cost a little more."""
    ruptures = pytest.importorskip("ruptures", reason="the extra `dev` is not installed")
    monkeypatch.setattr(history, "OUTLIER", np.inf)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(4, 9, 5)
        levels = np.cumsum(rng.choice([-1, 1], 5) * rng.uniform(3, 8, 5))
        values = np.repeat(levels, sizes) + rng.normal(0, 1, sizes.sum())
        pelt = ruptures.Pelt(model="l2", min_size=1, jump=1).fit(values)
        best, ours = pelt.predict(pen=history.PENALTY), [*history._segments(values), values.size]
        assert len(ours) == len(best)
        assert pelt.cost.sum_of_costs(ours) <= pelt.cost.sum_of_costs(best) + 1


def test_a_series_is_of_one_measure_and_knows_its_levels() -> None:
    rows = past(30)
    other = [row._replace(measure="another", value=3.0) for row in rows if row.check == "pydoc"]
    found = history.series([*rows, *other])
    assert len(found) == len(history.series(rows)) + 1
    assert {s.id[3] for s in found} == {"ppl", "kld_mean", "fma_share", "ratio/llama_cpp"}
    (ppl,) = (s for s in found if s.id[:4] == ("pydoc", "tiny", "pydoc", "ppl") and s.id[4] != "another")
    assert ppl.changes == [15]
    np.testing.assert_array_equal(ppl.levels, ppl.values)
    (share,) = (s for s in found if s.id[2:4] == ("tg64", "fma_share"))
    assert len(share.changes) == 2
    assert np.unique(share.levels).size == 3


def test_records_are_read_back_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    days = [TODAY - timedelta(days=2), TODAY - timedelta(days=1), TODAY]
    folder = store.regressions_folder(tmp_path, "00aa11bb22cc33dd")
    for at, day in enumerate(reversed(days)):
        run = replace(passed(), measured=measured(1 - 0.1 * at), provenance=provenance(day, cpu=f"cpu {at}"))
        file = record.write(folder, run)
        record.write(folder, replace(run, suite="another"), f"run-another-{at}")
    rows = history.read(tmp_path, "smoke")
    assert [row.finished_at for row in rows] == sorted(row.finished_at for row in rows)
    assert rows == [
        row
        for at, day in ((2, days[0]), (1, days[1]), (0, days[2]))
        for row in history.rows_of(measured(1 - 0.1 * at), provenance(day, cpu=f"cpu {at}"))
    ]
    file.with_name("run-broken.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"suite": ["smoke"]}), file.with_name("run-other.parquet"))
    with caplog.at_level(logging.WARNING):
        assert history.read(tmp_path, "smoke") == rows
    assert [said.getMessage().split()[0] for said in caplog.records] == [
        "run-broken.parquet",
        "run-other.parquet",
    ]
    assert history.read(tmp_path / "nowhere", "smoke") == []


def test_today_is_in_the_history_once() -> None:
    before = past(3)
    once = history.with_today(before, passed())
    assert len(once) == len(before) + 7
    assert history.with_today(once, passed()) == once
    assert history.with_today(before, replace(passed(), provenance={})) == before
    assert history.with_today([], replace(passed(), provenance={"finished_at": "yesterday"})) == []
    text = replace(passed(), provenance=provenance(TODAY) | {"finished_at": TODAY.isoformat()})
    assert history.with_today(before, text) == once


def test_the_made_up_example_has_the_changes_that_it_claims() -> None:
    ppl, share = history.series(history.example())
    assert ppl.changes == [30]
    assert np.abs(np.array(share.changes) - [15, 30, 45]).max() <= 2
