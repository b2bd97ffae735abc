"""`pagemill convert`: the command line, its JSON keys and exit codes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from jobs import convert, schema, usage
from pipeline.settings import ConvertSettings
from tests.checkpoints import make_checkpoint

OWN_KEYS = (
    "out sha256 bytes architecture n_tensors n_vocab n_vocab_padded tied pre_tokenizer peak_anonymous_bytes"
).split()


def test_a_conversion_ends_in_the_contracts_keys(pagemill, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a folder, with (signs)=", "mamba", {"vocab_size": 290})
    out = tmp_path / "m=1, (q8).gguf"
    answer = pagemill("convert", f"source.dir={folder}", f"convert.out={out}", "convert.type=Q8_0")
    assert (answer.exit_code, answer.line["ok"], answer.line["error"]) == (0, True, None)
    assert set(OWN_KEYS) <= answer.line.keys()
    assert answer.line["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert answer.line["bytes"] == out.stat().st_size
    assert answer.line["peak_anonymous_bytes"] > 1 << 20
    assert [answer.line[key] for key in ("architecture", "n_vocab", "n_vocab_padded", "tied")] == [
        "mamba", 290, 296, True,
    ]  # fmt: skip
    assert "padded from 290 to 296" in answer.line["warnings"][0]
    assert "padded from 290 to 296" in answer.stderr


def test_a_dry_run_checks_and_writes_nothing(pagemill, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    answer = pagemill("convert", f"source.dir={folder}", "convert.out=m.gguf", "dry_run=true")
    assert (answer.exit_code, answer.line["sha256"], answer.line["n_tensors"]) == (0, None, 22)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert.out=m.gguf"], "source.dir is not set"),
        (["source.dir=hf"], "convert.out is not set"),
        (["source.dir=none", "convert.out=m.gguf"], "there is no folder"),
        (["source.dir=hf", "convert.out=m.gguf", "convert.type=q5_0"], "did you mean q8_0"),
        (["source.dir=hf", "convert.out=m.gguf", "convert.tokenizer=none"], "no tokenizer.json"),
        (["source.dir=hf", "convert.outt=m.gguf"], "convert.outt"),
    ],
)
def test_a_refusal_is_exit_2_with_a_way_on(pagemill, tmp_path: Path, words: list[str], said: str) -> None:
    make_checkpoint(tmp_path / "hf", "mamba")
    answer = pagemill("convert", *words)
    assert (answer.exit_code, answer.line["ok"]) == (2, False)
    assert said in answer.line["error"]["message"] + answer.stderr
    assert answer.line["error"]["hint"]
    assert not (tmp_path / "m.gguf").exists()


def test_help_names_every_key() -> None:
    assert convert.SCHEMA is ConvertSettings
    page = usage.text("convert")
    assert [key for key in schema.keys(ConvertSettings) if f"  {key}=" not in page] == []
    assert max(map(len, page.splitlines())) <= 110
