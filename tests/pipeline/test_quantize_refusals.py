"""What cannot be quantized is refused before or while it is read; nothing is left of the file."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from pipeline.errors import ModelError, PipelineError, SettingsError, StorageFailure, StoreError
from pipeline.quantize.imatrix_file import Sums, write_imatrix
from tests.make_gguf import tiny_llama, write_gguf
from tests.pipeline.quantizations import experts, quantized

UP = "blk.1.ffn_up.weight"


def refused(
    source: Path, out: Path, *words: str, error: type[PipelineError] = SettingsError, **choices: Any
) -> None:
    """The run raises `error` with all `words` in its message or hint, and leaves nothing, dry or not."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error) as info:
        quantized(source, out, **choices)
    said = f"{info.value} {info.value.hint}"
    assert [word for word in words if word not in said] == [], said
    assert info.value.hint
    assert sorted(out.parent.iterdir()) == before


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "m.gguf")


CHOICES = {
    "unknown type": ({"type_": "Q4_K_X"}, ["Q4_K_X is not known", "did you mean Q4_K_"]),
    "unknown and like none": ({"type_": "???x"}, ["???x is not known", "Q8_0"]),
    "mixture read only": ({"type_": "iq3_xxs"}, ["can be read but not written", "nearest", "Q2_K"]),
    "type read only": ({"type_": "NVFP4"}, ["'NVFP4' can be decoded but not", "the nearest", "IQ4_NL"]),
    "rule without type": ({"tensor_types": ["attn_v"]}, ["'attn_v' is not of the form REGEX=TYPE"]),
    "rule without regex": ({"tensor_types": ["=Q8_0"]}, ["REGEX=TYPE"]),
    "no regex": ({"tensor_types": ["attn_(v=Q8_0"]}, ["'attn_(v'", "no regular expression", "unterminated"]),
    "no type": ({"tensor_types": ["attn_v=Q8_1x"]}, ["no tensor type Q8_1X", "did you mean Q"]),
    "type of a rule read only": (
        {"tensor_types": ["attn_v=IQ2_S"]}, ["'IQ2_S' can be decoded but not", "the nearest", "Q2_K"]
    ),
    "a rule for nothing": ({"tensor_types": ["attn_w=F16"]}, ["'attn_w=F16' matches no tensor", "token_emb"]),
    "a rule for norms": ({"tensor_types": ["norm=F16"]}, ["always stay as they are: blk.0.attn_norm.weight"]),
    "rows that do not divide": (
        {"tensor_types": ["ffn_down=Q4_K"]}, ["blk.0.ffn_down.weight has rows of 96", "256", "F16", "Q5_0"]
    ),
    "no imatrix": ({"type_": "Q2_K_S", "wide": True}, ["Q2_K_S needs an importance matrix", "or take Q2_K"]),
    "no place": ({"out": " "}, ["quantize.out is not set"]),
    "no model": ({"source": ""}, ["model.path is not set"]),
    "no threads": ({"threads": 0}, ["engine.threads=0 is too small"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("dry_run", [False, True])
def test_settings_that_cannot_be_used(tmp_path: Path, name: str, *, dry_run: bool) -> None:
    choices, words = CHOICES[name]
    choices = dict(choices)
    width = 256 if choices.pop("wide", False) else 64
    source = tiny_llama(tmp_path / "m.gguf", width=width)
    out = choices.pop("out", str(tmp_path / "o.gguf"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SettingsError) as info:
        quantized(choices.pop("source", source), out, dry_run=dry_run, **choices)
    said = f"{info.value} {info.value.hint}"
    assert [word for word in words if word not in said] == [], said
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_quantized_already_is_quantized_again_only_when_that_is_said(tmp_path: Path) -> None:
    source, out = tiny_llama(tmp_path / "m.gguf", type_name="Q4_1"), tmp_path / "o.gguf"
    refused(source, out, "15 of its tensors are quantized already (Q4_1)", "quantize.allow_requantize=true")
    assert quantized(source, out, allow_requantize=True)["types"]["Q8_0"] == 15


def test_a_type_that_cannot_be_decoded(tmp_path: Path) -> None:
    raw = np.zeros((32, 64), np.float64).tobytes()
    keys = {"general.architecture": "llama", "llama.block_count": 1}
    source = write_gguf(tmp_path / "m.gguf", keys, {"blk.0.attn_q.weight": ("F64", (32, 64), raw)})
    refused(source, tmp_path / "o.gguf", "blk.0.attn_q.weight is F64", "cannot be decoded", error=ModelError)


def test_inputs_that_are_no_models(tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    refused(tmp_path / "none.gguf", out, "none.gguf: No such file", "model.path", error=ModelError)
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", out, "text.gguf", "not a GGUF file", error=ModelError)
    empty = write_gguf(tmp_path / "empty.gguf", {"general.architecture": "llama"}, {})
    refused(empty, out, "has no tensors", error=ModelError)


# --- importance matrices


def imatrix(path: Path, changes: dict[str, Sums | None] | None = None, layers: int = 2) -> str:
    """An imatrix of a tiny LLaMA, some of it changed or left out."""
    entries = {
        f"blk.{layer}.{part}.weight": Sums(np.ones((1, 96 if part == "ffn_down" else 64), np.float32), _one())
        for layer in range(layers)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    entries |= changes or {}
    write_imatrix(path, {name: sums for name, sums in entries.items() if sums is not None}, ["t"], 4, 64)
    return str(path)


def _one(count: float = 1) -> np.ndarray:
    return np.array([count], np.float32)


def test_an_imatrix_of_another_model(tiny: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "o.gguf", tmp_path / "i.gguf"
    words = ["blk.2.attn_q.weight", "does not have", "another model"]
    refused(tiny, out, *words, error=ModelError, type_="Q4_0", imatrix=imatrix(path, layers=3))
    other = Sums(np.ones((1, 96), np.float32), _one())
    words = [UP, "96 columns, expected 64", "another model"]
    refused(tiny, out, *words, error=ModelError, type_="Q4_0", imatrix=imatrix(path, {UP: other}))
    refused(tiny, out, "m.gguf", "imatrix", error=ModelError, type_="Q4_0", imatrix=str(tiny))
    refused(tiny, out, "none", "No such file", error=ModelError, type_="Q4_0", imatrix=str(tmp_path / "none"))


def test_an_imatrix_that_saw_nothing(tiny: Path, tmp_path: Path) -> None:
    unseen = Sums(np.zeros((1, 64), np.float32), _one(0))
    path = imatrix(tmp_path / "i.gguf", {UP: unseen})
    refused(
        tiny,
        tmp_path / "o.gguf",
        f"{UP} has counts of 0",
        "more text",
        error=ModelError,
        type_="Q4_0",
        imatrix=path,
    )
    assert quantized(tiny, tmp_path / "o.gguf", "Q8_0", imatrix=path)["warnings"] == [], "Q8_0 does not ask"


def test_an_imatrix_that_lacks_tensors_is_warned_about_or_refused(tiny: Path, tmp_path: Path) -> None:
    path = imatrix(tmp_path / "i.gguf", {UP: None})
    warnings = quantized(tiny, tmp_path / "o.gguf", "Q4_0", imatrix=path)["warnings"]
    assert len(warnings) == 1
    assert f"lacks {UP}" in warnings[0]
    wide = experts(tmp_path / "w.gguf")
    entries = {"blk.0.ffn_up_exps.weight": Sums(np.ones((3, 256), np.float32), np.ones(3, np.float32))}
    write_imatrix(tmp_path / "w-i.gguf", entries, ["t"], 4, 64)
    words = ["lacks blk.1.ffn_up_exps.weight", "Q2_K_S needs"]
    choices = {"type_": "Q2_K_S", "imatrix": str(tmp_path / "w-i.gguf")}
    refused(wide, tmp_path / "p.gguf", *words, error=ModelError, **choices)


# --- the place


def test_an_output_that_is_an_input(tiny: Path, tmp_path: Path) -> None:
    content, path = tiny.read_bytes(), imatrix(tmp_path / "i.gguf")
    (tmp_path / "symbolic.gguf").symlink_to(tiny)
    (tmp_path / "hard.gguf").hardlink_to(tiny)
    for name in ("m.gguf", "symbolic.gguf", "hard.gguf", f"../{tmp_path.name}/m.gguf"):
        refused(tiny, tmp_path / name, "m.gguf, which is read", error=StoreError, overwrite=True)
    refused(tiny, Path(path), "which is read", error=StoreError, overwrite=True, imatrix=path)
    assert tiny.read_bytes() == content


def test_a_file_that_is_there_is_replaced_only_when_that_is_said(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    out.write_text("mine")
    refused(tiny, out, "exists", "quantize.overwrite=true", error=StoreError)
    assert out.read_text() == "mine"
    quantized(tiny, out, overwrite=True)
    assert out.stat().st_size > 1000
    (tmp_path / "folder").mkdir()
    refused(tiny, tmp_path / "folder", "exists", "a file's name", error=StoreError, overwrite=True)
    with pytest.raises(StoreError, match="no folder"):
        quantized(tiny, tmp_path / "no" / "m.gguf")


def test_too_little_room_is_seen_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = quantized(tiny, tmp_path / "o.gguf", dry_run=True)["bytes"]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": needed - 1}))
    words = [f"{needed - 1:,} bytes free", f"needs {needed:,}", "make room"]
    refused(tiny, tmp_path / "o.gguf", *words, error=StoreError)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": needed}))
    assert quantized(tiny, tmp_path / "o.gguf")["bytes"] == (tmp_path / "o.gguf").stat().st_size == needed


# --- while it is written


@pytest.mark.parametrize(
    ("type_name", "row", "column", "value"),
    [("F32", 5, 7, np.nan), ("F32", 95, 63, -np.inf), ("F16", 0, 0, np.inf), ("BF16", 9, 1, np.nan)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_that_are_no_numbers_are_named(
    tmp_path: Path, type_name: str, row: int, column: int, value: float, threads: int
) -> None:
    source = tiny_llama(tmp_path / "m.gguf", type_name=type_name)
    _change(source, UP, row * 64 + column, value)
    words = ["m.gguf: ", f"{UP}[{row}, {column}] is {value}", "broken"]
    refused(source, tmp_path / "o.gguf", *words, error=ModelError, threads=threads)


def test_weights_that_are_only_copied_are_looked_at_too(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m.gguf")
    _change(source, "output_norm.weight", 3, np.nan)
    refused(source, tmp_path / "o.gguf", "output_norm.weight[3] is nan", error=ModelError)
    source = tiny_llama(tmp_path / "q.gguf", type_name="Q8_0")
    _change(source, UP, 2, np.inf, "<f2", 34)  # the scale of the third block: row 1, columns 0 to 31
    refused(source, tmp_path / "o.gguf", f"{UP}[1, 0] is", error=ModelError)


def test_a_broken_weight_of_an_expert_is_named_by_expert_row_and_column(tmp_path: Path) -> None:
    source = experts(tmp_path / "m.gguf")
    _change(source, "blk.1.ffn_up_exps.weight", (2 * 64 + 63) * 256 + 11, np.nan)
    refused(source, tmp_path / "o.gguf", "ffn_up_exps.weight[2, 63, 11] is nan", error=ModelError)


@pytest.mark.parametrize("type_", ["F16", "Q8_0", "Q4_0"])
def test_weights_that_are_too_large_for_a_type_are_named(tmp_path: Path, type_: str) -> None:
    source = tiny_llama(tmp_path / "m.gguf")
    _change(source, UP, 3 * 64 + 40, -1e38)
    words = [f"{UP}[3, 40] is -1e+38, too large for {type_}", "=BF16"]
    refused(source, tmp_path / "o.gguf", *words, error=ModelError, type_=type_)
    quantized(source, tmp_path / "o.gguf", type_, tensor_types=[f"^{UP}$=BF16"])


@pytest.mark.parametrize("room", [1000, 60_000])
def test_a_disk_that_fills_leaves_no_half_file(tiny: Path, tmp_path: Path, room: int) -> None:
    """The kernel refuses to let a file grow, in the head or among the weights, and an old file stays."""
    out = tmp_path / "o.gguf"
    out.write_text("mine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        refused(tiny, out, "o.gguf", "nothing is left", error=StorageFailure, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_text() == "mine"


def test_a_disk_that_fails_as_it_is_flushed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    refused(tiny, tmp_path / "o.gguf", "No space left", "make room", error=StorageFailure)


def test_an_interrupt_leaves_no_half_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    quantized(tiny, tmp_path / "o.gguf")
    monkeypatch.setattr(engine, "quantize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantized(tiny, tmp_path / "p.gguf", threads=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "o.gguf"]


def _change(path: Path, name: str, index: int, value: float, dtype: str | None = None, size: int = 0) -> None:
    """Writes a number over one of a tensor's: weight `index`, or the first of a block of `size` bytes."""
    with engine.open(path) as file:
        tensor = file.tensors[name]
        offset, kind = tensor.offset, tensor.type.name
    if kind == "BF16":
        raw = (np.float32(value).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        raw = np.array(value, dtype or {"F32": "<f4", "F16": "<f2"}[kind]).tobytes()
    content = bytearray(path.read_bytes())
    at = offset + index * (size or len(raw))
    content[at : at + len(raw)] = raw
    path.write_bytes(content)
