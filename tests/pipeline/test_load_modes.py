"""Loading modes and split models through a whole run: columns of the row, and identities that do not move."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from make_gguf import split_gguf, tiny_llama

import engine
from engine import mapping
from pipeline import evaluate
from pipeline.errors import ModelError, SettingsError
from pipeline.provenance import file_sha256, model_sha256
from pipeline.settings import (
    LOAD_MODES,
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)

TEXT = "the cat sat on the mat and the other thing is on it " * 20
MB = 1_000_000


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """Evaluates a model inline; each call with results of its own."""
    (tmp_path / "t.txt").write_text(TEXT)

    def evaluated(model: Path, load: str, results: str) -> Any:
        return evaluate(
            PerplexitySettings(
                model=ModelSettings(str(model)),
                data=DataSettings(path=str(tmp_path / "t.txt")),
                protocol=ProtocolSettings(window=32, limit=4),
                engine=EngineSettings(load=load),
                cluster=ClusterSettings("inline", windows_per_shard=2),
                tracking=TrackingSettings("none"),
                paths=PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
            )
        )

    return evaluated


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "m.gguf", vocab=8000, width=256)


def row(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("table=runs/*/*.parquet")
    return pq.read_table(path).to_pylist()[0]


def test_every_mode_gives_the_same_run_and_its_row_tells_time_and_memory(
    run: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    parts = split_gguf(whole, tmp_path, 3)
    size = whole.stat().st_size
    keys, hashes, rows = set(), set(), {}
    for model in (whole, parts[0]):
        for load in LOAD_MODES:
            result = run(model, load, f"{model.stem}-{load}")
            rows[load] = told = row(tmp_path / f"{model.stem}-{load}")
            keys.add((result.summary["run_key"], model))
            hashes.add(result.summary["nll_sha256"])
            assert told["load_mode"] == result.summary["load_mode"] == load
            assert 0 < told["model_open_s"] <= told["load_s"]
            assert told["model_resident_bytes"] >= size
            if load in ("populate", "mlock"):  # the driver's mapping in this process is not touched
                assert size <= told["model_rss_bytes_max"]
            # pages that the driver has mapped too, in this same process, count by half
            assert (told["model_locked_bytes"] > 0.5 * size) == (load == "mlock")
    assert len(keys) == 2, "the mode is no part of the key, the bytes of the files are"
    assert len(hashes) == 1


def test_copy_is_in_the_workers_own_memory(run: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    run(whole, "mmap", "first")  # what a process allocates only once
    shared, copied = run(whole, "mmap", "a").summary, run(whole, "copy", "b").summary
    more = copied["anonymous_bytes_max"] - shared["anonymous_bytes_max"]
    assert abs(more - whole.stat().st_size) < 4 * MB
    assert copied["model_rss_bytes_max"] < whole.stat().st_size / 2 < shared["model_rss_bytes_max"]


def test_digest_of_parts_is_what_the_shell_prints_and_stays_when_they_move(
    whole: Path, tmp_path: Path
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "else where"
    elsewhere.mkdir()
    assert (
        model_sha256(whole, cache)
        == file_sha256(whole, cache)
        == hashlib.sha256(whole.read_bytes()).hexdigest()
    )
    parts = split_gguf(whole, tmp_path, 3)
    digest = model_sha256(parts[0], cache)
    command = "sha256sum m-*-of-*.gguf | cut -c -64 | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert digest == printed.stdout[:64]
    for part in parts:
        shutil.copy(part, elsewhere / part.name.replace("m-", "other-"))
    assert model_sha256(elsewhere / "other-00001-of-00003.gguf", tmp_path / "no cache") == digest
    last = elsewhere / "other-00003-of-00003.gguf"
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert model_sha256(elsewhere / "other-00001-of-00003.gguf", cache) != digest


def test_missing_part_is_refused_before_work(run: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    parts = split_gguf(whole, tmp_path, 3)
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"beside it is no m-00002-of-00003\.gguf") as caught:
        run(parts[0], "mmap", "results")
    assert (caught.value.exit_code, caught.value.kind) == (2, "GGUFFormatError")


def test_unknown_mode_is_refused_with_the_nearest(run: Callable[..., Any], whole: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"engine\.load=mlok is not known; did you mean mlock\?.*prefetch"
    ):
        run(whole, "mlok", "results")


def test_mlock_beyond_the_limit_refuses_the_run(
    run: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = mapping._call

    def refuses(name: str, path: str, *arguments: Any) -> None:
        if name == "mlock":
            raise OSError(12, "Cannot allocate memory", path)
        call(name, path, *arguments)

    monkeypatch.setattr("engine.mapping._call", refuses)
    with pytest.raises(engine.CapacityError, match="cannot be locked"):
        run(whole, "mlock", "results")
    assert not list((tmp_path / "results").rglob("*.parquet"))
    assert json.loads(next((tmp_path / "results").rglob("plan.json")).read_text())
