"""The soak: that it sees what it looks for, and (slow) a minute and a half of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import soak
from jobs.soak import Kill, Life
from pipeline.metrics import nll_sha256

ROOT = Path(__file__).parents[2]


def life(folder: Path, *events: dict[str, Any]) -> Life:
    """A driver's, with these events in its log."""
    log = folder / "driver.log"
    log.write_text("not JSON\n" + "".join(json.dumps(event) + "\n" for event in events))
    return Life(cast(Any, None), log, 0.0)


def rows(sums: list[float]) -> list[dict[str, Any]]:
    same = dict.fromkeys(soak.ALIKE, 1)
    return [{**same, "window": i, "nll_sum_nats": nll} for i, nll in enumerate(sums)]


def test_a_bit_that_differs_and_a_window_that_is_missing_or_there_twice_are_seen(tmp_path: Path) -> None:
    expected = rows([1.0, 2.0])
    digest = nll_sha256(pa.array([1.0, 2.0, 1.0]).to_numpy())

    def same(sums: list[float], said: str = digest) -> Any:
        for path in tmp_path.glob("*.parquet"):
            path.unlink()
        pq.write_table(pa.Table.from_pylist(rows(sums)), tmp_path / "shard-00000000.parquet")
        last = {"ok": True, "table": str(tmp_path), "nll_sha256": said}
        return soak._compared(last, expected, 3)["same_bits"]

    assert same([1.0, 2.0, 1.0])
    assert not same([1.0, 2.0 + 2**-51, 1.0])
    assert not same([1.0, 2.0])
    assert not same([1.0, 2.0, 1.0, 2.0])
    assert not same([1.0, 2.0, 1.0], "0" * 64)
    broken = {"ok": False, "error": {"message": "shards were set aside"}}
    assert soak._compared(broken, expected, 3) == {"complete": False, "same_bits": False, "nll_sha256": None}


def test_what_was_computed_again_and_how_long_things_took_is_read_from_the_log(tmp_path: Path) -> None:
    lives = [
        life(
            tmp_path,
            {"event": "shard_retried", "time": "1970-01-01T00:01:41.500Z"},
            {"event": "worker_lost", "time": "1970-01-01T00:01:41.500Z"},
            {"event": "worker_back", "time": "1970-01-01T00:01:43.500Z", "recovery_s": 2.0},
            {"event": "shard_doubled", "time": "1970-01-01T00:02:00.000Z"},
        )
    ]
    kills = [Kill("worker", 100.0), Kill("driver", 110.0)]
    assert soak._again(lives, kills, 2, 40) == {"shards_again_at_most": 4, "shards_again_share": 0.1}
    assert soak._times(lives, kills) == {
        "detection_s_median": 1.5,
        "recovery_s_median": 2.0,
        "recovery_s_max": 2.0,
    }


def test_a_driver_that_grows_is_seen(tmp_path: Path) -> None:
    flat = life(tmp_path)
    flat.samples = [(20.0 + i, {"fds": 50, "anonymous_bytes": 9, "object_store_bytes": 0}) for i in range(40)]
    growing = life(tmp_path)
    growing.samples = [
        (i, {"fds": 50 + i, "anonymous_bytes": 9, "object_store_bytes": 0}) for i in range(100)
    ]
    assert soak._growth([flat])["fds_growth_max"] == 0
    assert soak._growth([flat, growing])["fds_growth_max"] > soak.ROOM["fds"]


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["missing.gguf"])
    assert "no model file at missing.gguf" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_minute_and_a_half_of_kills(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main([str(ROOT / "tests/data/mamba-tiny-q8_0.gguf"), "--seconds", "90"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["ok"]
    assert min(summary["kills"].values()) >= 1
    assert summary["n_drivers"] == summary["kills"]["driver"] + 1
    assert summary["detection_s_median"] < 30
    assert summary["recovery_s_median"] < 60
