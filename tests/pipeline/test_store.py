"""Store: first writer wins, what is published never changes, a finished shard is its file."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import store
from pipeline.errors import StorageFailure, StoreError
from pipeline.shards import Shard, plan
from pipeline.tables import RUNS_SCHEMA, WINDOWS_SCHEMA, table

KEY = "0123456789abcdef"
WANTED = {"run_key": KEY, "n_windows": 6, "windows_per_shard": 2}


def rows(shard, value=1.0):
    windows = range(shard.first_window, shard.first_window + shard.n_windows)
    return table([{"window": w, "nll_sum_nats": value + w, "n_scored": 255} for w in windows], WINDOWS_SCHEMA)


def commit(folder, shard, value=1.0, key=KEY):
    return store.commit(rows(shard, value), folder / shard.file_name, store.shard_meta(shard, key))


def visible(folder):
    return sorted(path.name for path in folder.iterdir())


def test_first_writer_wins_and_nothing_is_left_beside(tmp_path):
    shard = Shard(0, 2)
    assert commit(tmp_path, shard)
    assert not commit(tmp_path, shard, 9.0)
    assert visible(tmp_path) == [shard.file_name]
    back = store.read_windows({shard: tmp_path / shard.file_name})
    assert back.column("nll_sum_nats").to_pylist() == [1.0, 2.0]
    assert back.schema.equals(WINDOWS_SCHEMA)


def test_of_many_writers_at_once_exactly_one_wins(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda value: commit(tmp_path, Shard(0, 2), float(value)), range(24)))
    assert sum(won) == 1
    assert visible(tmp_path) == ["shard-00000000.parquet"]
    winner = float(won.index(True))
    stored = store.read_windows({Shard(0, 2): tmp_path / "shard-00000000.parquet"})
    assert stored.column("nll_sum_nats").to_pylist() == [winner, winner + 1]


def test_plan_is_fixed_at_the_first_start(tmp_path):
    assert store.read_plan(tmp_path, WANTED) is None
    assert store.fix_plan(tmp_path, WANTED) == WANTED
    assert store.fix_plan(tmp_path, WANTED | {"windows_per_shard": 5}) == WANTED


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", json.dumps(WANTED | {"run_key": "x"}), json.dumps(WANTED | {"windows_per_shard": 0})],
)
def test_a_plan_that_is_broken_or_foreign_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(StoreError, match=r"plan\.json"):
        store.fix_plan(tmp_path, WANTED)


def test_listing_counts_finished_shards_and_reports_the_rest(tmp_path):
    shards = plan(8, 2)
    for shard in shards[:2]:
        commit(tmp_path, shard)
    store.fix_plan(tmp_path, WANTED)
    good = (tmp_path / shards[0].file_name).read_bytes()
    (tmp_path / shards[2].file_name).write_bytes(good[: len(good) // 2])
    commit(tmp_path, shards[3], key="f" * 16)
    commit(tmp_path, Shard(1, 2))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".shard-00000006.parquet.1.tmp").write_text("left by a killed worker")
    found = store.finished_shards(tmp_path, shards, KEY)
    assert list(found.paths) == shards[:2]
    said = "\n".join(found.remarks)
    assert len(found.remarks) == 4
    assert "notes.txt" in said
    assert "shard-00000001.parquet: not a file of this run" in said
    assert "shard-00000004.parquet: is broken" in said
    assert "shard-00000006.parquet: is another run's" in said
    assert all(commit(tmp_path, shard) for shard in shards[2:]), "a broken file does not block its shard"
    assert list(store.finished_shards(tmp_path, shards, KEY).paths) == shards


def test_a_shard_with_other_windows_than_its_name_is_not_counted(tmp_path):
    shard = Shard(0, 2)
    store.commit(rows(Shard(2, 2)), tmp_path / shard.file_name, store.shard_meta(shard, KEY))
    found = store.finished_shards(tmp_path, [shard], KEY)
    assert not found.paths
    assert "other windows" in found.remarks[0]


def test_windows_are_read_in_window_order(tmp_path):
    shards = plan(6, 2)
    for shard in reversed(shards):
        commit(tmp_path, shard)
    paths = store.finished_shards(tmp_path, shards, KEY).paths
    assert store.read_windows(dict(reversed(paths.items()))).column("window").to_pylist() == list(range(6))


def test_hive_readers_get_the_run_key(tmp_path):
    import pyarrow.dataset as ds

    folder = store.windows_folder(tmp_path, KEY)
    store.probe(folder, "paths.results")
    store.fix_plan(folder, WANTED)
    commit(folder, Shard(0, 2))
    part = ds.partitioning(pa.schema([("run_key", pa.string())]), flavor="hive")
    back = ds.dataset(
        sorted(folder.glob("*.parquet")), partitioning=part, partition_base_dir=str(folder.parent)
    ).to_table()
    assert set(back.column("run_key").to_pylist()) == {KEY}
    assert "run_key" not in WINDOWS_SCHEMA.names + RUNS_SCHEMA.names


def test_every_column_says_its_unit():
    for schema in (WINDOWS_SCHEMA, RUNS_SCHEMA):
        assert all(field.metadata and field.metadata[b"unit"] for field in schema)
        assert schema.metadata[b"pagemill.schema_version"] == b"1"
    with pytest.raises(ValueError, match="typo"):
        table([{"typo": 1}], WINDOWS_SCHEMA)


def test_probe_leaves_nothing_and_refuses_what_cannot_be_written(tmp_path, monkeypatch):
    store.probe(tmp_path / "a/b", "paths.results")
    assert visible(tmp_path / "a/b") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"paths\.results: cannot write to .*file") as caught:
        store.probe(tmp_path / "file", "paths.results")
    assert caught.value.exit_code == 2
    with pytest.raises(StoreError):
        store.probe(tmp_path / "file/below", "paths.results")
    monkeypatch.setattr(
        os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no hard links"))
    )
    with pytest.raises(StoreError, match="no hard links"):
        store.probe(tmp_path / "a", "paths.results")


def test_probe_refuses_a_disk_that_is_all_but_full(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, (1 << 30) - 5, 5))
    with pytest.raises(StoreError, match="5 bytes free"):
        store.probe(tmp_path, "paths.results")


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_full_disk_keeps_finished_shards_and_leaves_no_half_file(tmp_path, monkeypatch, step):
    commit(tmp_path, Shard(0, 2))

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((pq, "write_table", full) if step == "write" else (os, "fsync", full)))
    with pytest.raises(StorageFailure, match=r"shard-00000002\.parquet: no space left") as caught:
        commit(tmp_path, Shard(2, 2))
    assert caught.value.exit_code == 3
    assert "finished shards are kept" in caught.value.hint
    assert visible(tmp_path) == ["shard-00000000.parquet"]


def test_the_kernels_own_refusal_to_write_more_is_told_as_such(tmp_path):
    """A file size limit makes write() itself fail, inside Arrow's writer."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from pipeline import store\n"
        "from pipeline.errors import StorageFailure\n"
        "from pipeline.tables import WINDOWS_SCHEMA, table\n"
        "rows = table([{'window': 0}], WINDOWS_SCHEMA)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
        "try:\n"
        "    store.commit(rows, Path(sys.argv[1]) / 'shard-00000000.parquet', {})\n"
        "except StorageFailure as error:\n"
        "    assert 'no space left' in str(error), error\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(store.__file__).parents[1], check=False
    )
    assert done.returncode == 7
    assert visible(tmp_path) == []
