"""`pagemill quantize`: the command line, its JSON keys and exit codes."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jobs import completion, quantize, schema, usage
from jobs.cli import JOBS
from jobs.outcome import COMMON_KEYS
from jobs.overrides import quote_paths
from pipeline.quantize.settings import QuantizeSettings
from tests.make_gguf import tiny_llama, write_gguf
from tests.pipeline.conversions import types_of

OWN_KEYS = "out sha256 bytes bpw types fallbacks peak_anonymous_bytes gb_per_s".split()


def test_a_run_ends_in_the_contracts_keys(pagemill, tmp_path: Path) -> None:
    source, out = tiny_llama(tmp_path / "a file, with (signs)=.gguf"), tmp_path / "m=1, (q4).gguf"
    answer = pagemill(
        "quantize", f"model.path={source}", f"quantize.out={out}", "quantize.type=q4_k_m", "engine.threads=2"
    )
    assert (answer.exit_code, answer.line["ok"], answer.line["error"]) == (0, True, None)
    assert {*OWN_KEYS, *COMMON_KEYS} <= answer.line.keys()
    assert answer.line["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert answer.line["bytes"] == out.stat().st_size
    assert answer.line["peak_anonymous_bytes"] > 1 << 20
    assert answer.line["types"] == {"Q5_0": 12, "F32": 5, "Q8_0": 3}
    assert {"tensor", "wanted", "type", "why"} == answer.line["fallbacks"][0].keys()
    assert "tensors are Q5_0 instead of Q4_K: rows of 64 weights are not whole blocks" in answer.stderr
    assert "bits per weight" in answer.stderr


def test_a_dry_run_is_a_table_and_writes_nothing(pagemill, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf")
    words = ["model.path=m.gguf", "quantize.type=Q8_0", "quantize.out=o.gguf", "dry_run=true"]
    answer = pagemill("quantize", *words, r"quantize.tensor_types=[blk\.[0]\.attn_(q|k)=F16,token_embd=BF16]")
    assert (answer.exit_code, answer.line["sha256"], len(answer.line["tensors"])) == (0, None, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    table = [line for line in answer.stderr.splitlines() if " x " in line or line.startswith("tensor ")]
    assert table[0].split() == ["tensor", "shape", "from", "to", "bytes", "bits/weight"]
    assert len({len(line) for line in table}) == 1, "aligned"
    rows = {row["name"]: row for row in answer.line["tensors"]}
    assert rows["blk.0.attn_k.weight"] == {
        "name": "blk.0.attn_k.weight", "shape": [32, 64], "from": "F32", "to": "F16", "bytes": 4096,
        "bits_per_weight": 16.0,
    }  # fmt: skip
    assert [rows[f"{name}.weight"]["to"] for name in ("blk.0.attn_v", "blk.1.attn_q", "token_embd")] == [
        "Q8_0", "Q8_0", "BF16",
    ]  # fmt: skip


MODEL, TYPE, OUT = "model.path=m.gguf", "quantize.type=Q8_0", "quantize.out=o.gguf"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([TYPE, OUT], "model.path is not set"),
        ([MODEL, OUT], "quantize.type is not set"),
        ([MODEL, TYPE], "quantize.out is not set"),
        (["model.path=none.gguf", TYPE, OUT], "No such file"),
        ([MODEL, "quantize.type=q4_k_x", OUT], "did you mean Q4_K"),
        ([MODEL, "quantize.type=IQ2_XXS", OUT], "Q2_K"),
        ([MODEL, TYPE, "quantize.out=m.gguf", "quantize.overwrite=true"], "which is read"),
        ([MODEL, TYPE, OUT, "quantize.imatrix=a=b, c"], "a=b, c"),
        ([MODEL, TYPE, OUT, "quantize.tensor_types=[attn_w=F16]"], "matches no tensor"),
        ([MODEL, TYPE, OUT, "quantize.tensor_types=['attn_(=F16']"], "no regular expression"),
        ([MODEL, TYPE, OUT, "engine.threads=0"], "engine.threads=0"),
        ([MODEL, TYPE, "quantize.outt=m.gguf"], "quantize.outt"),
    ],
)
def test_a_refusal_is_exit_2_with_a_way_on(pagemill, tmp_path: Path, words: list[str], said: str) -> None:
    before = tiny_llama(tmp_path / "m.gguf").read_bytes()
    answer = pagemill("quantize", *words)
    assert (answer.exit_code, answer.line["ok"]) == (2, False)
    assert said in answer.line["error"]["message"] + answer.stderr
    assert answer.line["error"]["hint"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == before


@pytest.mark.parametrize(
    "written",
    [
        "[attn_v=Q8_0,ffn_down=Q6_K]",
        "['attn_v=Q8_0','ffn_down=Q6_K']",
        "[ attn_v=Q8_0, ffn_down=Q6_K ]",
    ],
)
def test_rules_are_written_as_the_shell_gives_them(pagemill, tmp_path: Path, written: str) -> None:
    tiny_llama(tmp_path / "m.gguf", width=256, ff=256, n_layers=1)
    answer = pagemill("quantize", MODEL, "quantize.type=Q4_0", OUT, f"quantize.tensor_types={written}")
    assert answer.exit_code == 0, answer.line["error"]
    types = types_of(tmp_path / "o.gguf")
    assert [types[f"blk.0.{name}.weight"] for name in ("attn_v", "ffn_down", "attn_q")] == [
        "Q8_0", "Q6_K", "Q4_0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "quoted"),
    [
        ("attn_v=Q8_0", "['attn_v=Q8_0']"),
        (r"[a{1,2}\.=Q8_0,(b|c)$=F16]", r"['a{1,2}\.=Q8_0','(b|c)$=F16']"),
        ("[[a-z]+=Q8_0]", "['[a-z]+=Q8_0']"),
        ("[nonsense]", "['nonsense']"),
        ("[]", "[]"),
        ("null", "null"),
    ],
)
def test_regular_expressions_are_quoted_for_hydra(written: str, quoted: str) -> None:
    key = "quantize.tensor_types"
    assert quote_paths([f"{key}={written}"]) == [f"{key}={quoted}"]


def test_an_interrupt_is_130_and_leaves_nothing(tmp_path: Path) -> None:
    """The file has been begun when the signal comes: rows so long and so many take seconds."""
    values = np.random.default_rng(0).normal(0, 1, (6000, 1024)).astype("<f4").tobytes()
    keys = {"general.architecture": "llama", "llama.block_count": 1}
    tensors = {f"blk.0.ffn_{name}.weight": ("F32", (6000, 1024), values) for name in ("up", "gate", "x", "y")}
    write_gguf(tmp_path / "m.gguf", keys, tensors)
    words = ["quantize", MODEL, "quantize.type=IQ4_XS", OUT]
    child = subprocess.Popen(
        [sys.executable, "-c", _RUN, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (begun := list(tmp_path.glob(".o.gguf.*"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert begun
    assert child.returncode == 130
    assert '"Interrupted"' in out.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


_RUN = "from jobs.cli import main; main()"


def test_completion_offers_the_job_and_its_keys() -> None:
    def main_of(job: str):
        return quantize.main

    assert "quantize" in completion.candidates("pagemill qu", JOBS, main_of)
    offered = completion.candidates("pagemill quantize quantize.al", JOBS, main_of)
    assert offered == ["quantize.allow_requantize="]
    assert completion.candidates("pagemill quantize quantize.imatrix=", JOBS, main_of) == []


def test_help_names_every_key() -> None:
    assert quantize.SCHEMA is QuantizeSettings
    page = usage.text("quantize")
    assert [key for key in schema.keys(QuantizeSettings) if f"  {key}=" not in page] == []
    assert max(map(len, page.splitlines())) <= 110
