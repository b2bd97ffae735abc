"""`pagemill imatrix`: the command line, its JSON keys and exit codes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from make_gguf import tiny_llama
from omegaconf import OmegaConf

from jobs import cli, imatrix, schema, usage
from pipeline.imatrix.settings import ImatrixSettings

COMMON_KEYS = (
    "job ok exit_code error run_key measure_key table mlflow_run_id wall_s compile_s load_s version numerics "
    "warnings"
).split()
OWN_KEYS = "out n_windows n_tensors sha256".split()


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A run of a second, but for where its file goes."""
    folder = tmp_path / "a folder, with (signs)="
    folder.mkdir()
    model = tiny_llama(folder / "m.gguf")
    (folder / "t.txt").write_text("The quick brown fox jumps over the lazy dog, nobody asks why. " * 5)
    inputs = [f"model.path={model}", f"data.path={folder / 't.txt'}", "protocol.window=32"]
    return [*inputs, "cluster=inline", "tracking=none", "paths.cache=c"]


def test_a_run_ends_in_the_contracts_keys(pagemill, tmp_path: Path, words: list[str]) -> None:
    out = tmp_path / "i=1, (x).gguf"
    answer = pagemill("imatrix", *words, f"imatrix.out={out}", "protocol.limit=2")
    assert (answer.exit_code, answer.line["ok"], answer.line["error"]) == (0, True, None)
    assert {*COMMON_KEYS, *OWN_KEYS} <= answer.line.keys()
    assert answer.line["job"] == "imatrix"
    assert answer.line["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert (answer.line["out"], answer.line["n_windows"], answer.line["n_tensors"]) == (str(out), 2, 14)
    assert len(answer.stdout.splitlines()) == 1
    assert f"{out}: 14 matrices, 2 windows" in answer.stderr


def test_a_dry_run_tells_the_plan(pagemill, tmp_path: Path, words: list[str]) -> None:
    answer = pagemill("imatrix", *words, "imatrix.out=i.gguf", "dry_run=true")
    assert (answer.exit_code, answer.line["sha256"], answer.line["n_shards"]) == (0, None, 2)
    assert not (tmp_path / "i.gguf").exists()


def test_what_overflows_is_exit_3_with_every_key(pagemill, tmp_path: Path, words: list[str]) -> None:
    import numpy as np

    tiny_llama(tmp_path / "huge.gguf", extra={"blk.0.attn_norm.weight": np.full(64, 1e7, np.float32)})
    answer = pagemill("imatrix", *words, f"model.path={tmp_path / 'huge.gguf'}", "imatrix.out=i.gguf")
    assert (answer.exit_code, answer.line["ok"], answer.line["sha256"]) == (3, False, None)
    assert answer.line["error"]["type"] == "IncompleteError"
    assert "blk.0.attn_q.weight" in answer.line["error"]["message"]
    assert {*COMMON_KEYS, *OWN_KEYS} <= answer.line.keys()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "imatrix.out is not set"),
        (["imatrix.out=there.gguf"], "exists"),
        (["imatrix.out=none/i.gguf"], "there is no folder"),
        (["imatrix.out=i.gguf", "protocol=carry"], "protocol.name=carry is not of this job"),
        (["imatrix.out=i.gguf", "protocol.window=500"], "expected at least 1,000, two windows"),
        (["imatrix.out=i.gguf", "imatrix.outt=i.gguf"], "imatrix.outt"),
        (["imatrix.out=i.gguf", "sweep={}"], "sweep"),
        (["imatrix.out=i.gguf", "model.path=none.gguf"], "none.gguf"),
    ],
)
def test_a_refusal_is_exit_2_with_a_way_on(
    pagemill, tmp_path: Path, words: list[str], more: list[str], said: str
) -> None:
    (tmp_path / "there.gguf").touch()
    answer = pagemill("imatrix", *words, *more)
    assert (answer.exit_code, answer.line["ok"]) == (2, False)
    assert said in answer.line["error"]["message"]
    assert answer.line["error"]["hint"]
    assert not (tmp_path / "i.gguf").exists()


def test_help_names_every_key() -> None:
    assert "imatrix" in cli.JOBS
    assert imatrix.SCHEMA is ImatrixSettings
    page = usage.text("imatrix")
    assert [key for key in schema.keys(ImatrixSettings) if f"  {key}=" not in page] == []
    assert max(map(len, page.splitlines())) <= 110


def test_the_default_choices_are_the_schemas_defaults() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        assert compose("imatrix") == OmegaConf.structured(ImatrixSettings)
