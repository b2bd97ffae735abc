"""Files become those that llama-quantize makes: weights, their order, metadata, whatever the threads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

import engine
from pipeline import gguf_writer
from pipeline.memory import process_memory
from pipeline.quantize import stream
from pipeline.quantize.imatrix_file import Sums, write_imatrix
from pipeline.quantize.mixtures import MIXTURES
from tests.make_gguf import split_gguf, tiny_llama, write_gguf
from tests.make_mamba_gguf import tiny_mamba
from tests.pipeline.conversions import types_of
from tests.pipeline.quantizations import by_libllama, experts, quantized, raw_of, wide_llama

ASKED_FOR = ("Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "IQ4_XS")
OTHERS = [name for name in MIXTURES if name not in (*ASKED_FOR, "F32", "Q2_K_S", "MXFP4_MOE")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_llama(tmp_path_factory.mktemp("wide") / "m.gguf")


@pytest.mark.parametrize(
    "type_", [*ASKED_FOR, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_a_file_is_the_one_that_libllama_makes(wide: Path, tmp_path: Path, type_: str) -> None:
    """Every byte: head, order of tensors, weights, padding."""
    theirs = by_libllama(wide, tmp_path / "theirs.gguf", type_)
    summary = quantized(wide, tmp_path / "ours.gguf", type_, threads=2)
    assert (tmp_path / "ours.gguf").read_bytes() == theirs
    assert summary["sha256"] == hashlib.sha256(theirs).hexdigest()
    assert summary["bytes"] == len(theirs)
    with engine.open(wide) as file:
        n_values = sum(np.prod(tensor.shape) for tensor in file.tensors.values())
    n_bytes = sum(len(raw) for raw in raw_of(tmp_path / "theirs.gguf").values())
    assert summary["bpw"] == pytest.approx(8 * n_bytes / n_values)
    assert sum(summary["types"].values()) == summary["n_tensors"] == 21
    assert summary["gb_per_s"] > 0


@pytest.mark.parametrize("source_type", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_files_that_are_no_f32_give_what_libllama_makes_of_them(tmp_path: Path, source_type: str) -> None:
    source = tiny_llama(tmp_path / "m.gguf", type_name=source_type, tied=False, ff=128)
    theirs = by_libllama(source, tmp_path / "theirs.gguf", "Q4_0", allow_requantize=True)
    quantized(source, tmp_path / "ours.gguf", "Q4_0", allow_requantize=source_type[0] == "Q")
    assert (tmp_path / "ours.gguf").read_bytes() == theirs


def test_rows_that_do_not_divide_take_the_types_that_libllama_takes(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m.gguf")  # rows of 64 and 96
    summary = quantized(source, tmp_path / "ours.gguf", "Q4_K_M")
    assert (tmp_path / "ours.gguf").read_bytes() == by_libllama(source, tmp_path / "t.gguf", "Q4_K_M")
    fallbacks = {row["tensor"]: row for row in summary["fallbacks"]}
    assert fallbacks["blk.0.ffn_up.weight"] == {
        "tensor": "blk.0.ffn_up.weight", "wanted": "Q4_K", "type": "Q5_0",
        "why": "rows of 64 weights are not whole blocks of 256",
    }  # fmt: skip
    assert len(fallbacks) == 15


def test_a_mamba_is_quantized_as_libllama_does(tmp_path: Path) -> None:
    source = tiny_mamba(tmp_path / "m.gguf", width=64, dt_rank=32)
    quantized(source, tmp_path / "ours.gguf", "Q8_0")
    assert (tmp_path / "ours.gguf").read_bytes() == by_libllama(source, tmp_path / "theirs.gguf", "Q8_0")


def test_stacks_of_experts_are_quantized_as_libllama_does(tmp_path: Path) -> None:
    source = experts(tmp_path / "m.gguf")
    quantized(source, tmp_path / "ours.gguf", "Q4_K_M")
    assert (tmp_path / "ours.gguf").read_bytes() == by_libllama(source, tmp_path / "t.gguf", "Q4_K_M")


def test_an_imatrix_weighs_each_expert_by_its_own_columns(tmp_path: Path) -> None:
    libgguf = pytest.importorskip("libgguf", reason="libgguf is not installed")
    rng = np.random.default_rng(5)
    source, name = experts(tmp_path / "m.gguf"), "blk.1.ffn_up_exps.weight"
    sums = rng.lognormal(0, 2, (3, 256)).astype(np.float32)
    counts = np.array([7, 0, 9], np.float32)
    entries = {name: Sums(sums, counts)}
    write_imatrix(tmp_path / "i.gguf", entries, ["wiki.txt", "more.txt"], 40, 512)
    out = tmp_path / "ours.gguf"
    summary = quantized(source, out, "Q4_K_M", imatrix=str(tmp_path / "i.gguf"))
    values = np.frombuffer(raw_of(source)[name], np.float32).reshape(3, 64, 256)
    weights = [sums[0] / counts[0], np.ones(256, np.float32), sums[2] / counts[2]]
    wanted = [
        libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType[types_of(out)[name]], imatrix=own).tobytes()
        for rows, own in zip(values, weights, strict=True)
    ]
    assert raw_of(out)[name] == b"".join(wanted)
    quantized(source, tmp_path / "plain.gguf", "Q4_K_M")
    assert raw_of(tmp_path / "plain.gguf")[name] != raw_of(out)[name]
    assert "lacks blk.0.ffn_up_exps.weight" in summary["warnings"][0]
    assert f"some experts of {name} (1 of 3)" in summary["warnings"][1]
    with engine.open(out) as file:
        assert list(file.metadata.items())[-4:] == [
            ("quantize.imatrix.file", "i.gguf"),
            ("quantize.imatrix.dataset", "wiki.txt"),
            ("quantize.imatrix.entries_count", 1),
            ("quantize.imatrix.chunks_count", 40),
        ]


def test_metadata_are_kept_as_they_are(wide: Path, tmp_path: Path) -> None:
    quantized(wide, tmp_path / "ours.gguf", "Q6_K")
    with engine.open(wide) as before, engine.open(tmp_path / "ours.gguf") as after:
        old, new = before.raw_metadata(), after.raw_metadata()
        assert b"".join(old.values()) == wide.read_bytes()[24 : before.metadata_end]
        dropped = {"split.count", "general.file_type"}
        assert list(new) == [key for key in old if key not in dropped] + [
            "general.quantization_version", "general.file_type",
        ]  # fmt: skip
        assert all(new[key] == raw for key, raw in old.items() if key not in dropped)
        assert after.metadata["general.file_type"] == 18


def test_another_alignment_is_kept(tmp_path: Path) -> None:
    """Which libllama does not: its own tensors lie beyond the end of the file that it writes."""
    source = tiny_llama(tmp_path / "m.gguf", **{"general.alignment": 4096})
    quantized(source, tmp_path / "ours.gguf")
    quantized(tiny_llama(tmp_path / "32.gguf"), tmp_path / "plain.gguf")
    with engine.open(tmp_path / "ours.gguf") as file:
        assert file.alignment == 4096
        assert all(tensor.offset % 4096 == 0 for tensor in file.tensors.values())
    assert raw_of(tmp_path / "ours.gguf") == raw_of(tmp_path / "plain.gguf")


def test_parts_are_joined(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m.gguf")
    quantized(source, tmp_path / "whole.gguf", "Q4_0")
    parts = split_gguf(source, tmp_path, 3)
    quantized(parts[0], tmp_path / "joined.gguf", "Q4_0", threads=2)
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_what_has_its_type_already_is_copied(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m.gguf", type_name="Q8_0", embedding_type="Q8_0")
    quantized(source, tmp_path / "ours.gguf", "Q8_0")
    assert raw_of(tmp_path / "ours.gguf") == raw_of(source)


def test_types_of_tensors_that_the_user_chose(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m.gguf")
    rules = ["blk\\.0\\.attn_q=q8_0", "attn_(q|k)=F16", "token_embd=BF16"]
    quantized(source, tmp_path / "ours.gguf", "Q4_0", tensor_types=rules)
    types = types_of(tmp_path / "ours.gguf")
    assert [types[f"blk.{i}.attn_{part}.weight"] for i in (0, 1) for part in "qkv"] == [
        "Q8_0", "F16", "Q4_0", "F16", "F16", "Q4_0",
    ]  # fmt: skip
    assert types["token_embd.weight"] == "BF16"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_bytes_do_not_depend_on_threads_and_pieces(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = quantized(wide, tmp_path / "one.gguf", "Q4_0")
    monkeypatch.setattr(stream, "PIECE_VALUES", 7 * 256)
    assert quantized(wide, tmp_path / "three.gguf", "Q4_0", threads=3)["sha256"] == once["sha256"]


def test_large_tensors_are_never_in_memory_whole(tmp_path: Path) -> None:
    source, name = tmp_path / "m.gguf", "token_embd.weight"
    values = np.random.default_rng(0).normal(0, 1, (60_000, 256)).astype("<f4")
    keys = {"general.architecture": "llama", "llama.block_count": 1}
    write_gguf(source, keys, {name: ("F32", values.shape, values.tobytes())})
    del values
    quantized(tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "t.gguf", "Q8_0")  # what is compiled stays
    with engine.open(source) as file:
        before = int(process_memory()["anonymous_bytes"])
        summary = quantized(source, tmp_path / "ours.gguf", "Q8_0", threads=2)
        assert summary["peak_anonymous_bytes"] - before < 30 << 20, "the tensor alone is 61 MB"
        assert file.tensors[name].n_bytes == 61_440_000


def test_pages_that_were_read_are_given_back(tmp_path: Path) -> None:
    source, values = tmp_path / "m.gguf", np.ones((1000, 1024), "<f4")
    write_gguf(source, {"general.architecture": "llama"}, {"w": ("F32", values.shape, values.tobytes())})
    for load in ("mmap", "copy"):
        with engine.open(source, load=load) as file:
            tensor = file.tensors["w"]
            total = int(tensor.data.sum())
            before = int(process_memory(source)["rss_bytes"])
            file.release(tensor, 0, tensor.n_bytes)
            after = int(process_memory(source)["rss_bytes"])
            assert (before - after > 3_500_000) == (load == "mmap")
            assert int(tensor.data.sum()) == total


def test_a_dry_run_lists_every_tensor_and_writes_nothing(wide: Path, tmp_path: Path) -> None:
    dry = quantized(wide, tmp_path / "ours.gguf", "Q4_K_M", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = quantized(wide, tmp_path / "ours.gguf", "Q4_K_M")
    assert [dry[key] for key in ("bytes", "bpw", "types")] == [done[key] for key in ("bytes", "bpw", "types")]
    assert (dry["sha256"], dry["gb_per_s"], dry["peak_anonymous_bytes"]) == (None, None, None)
    with engine.open(tmp_path / "ours.gguf") as file:
        listed = [(t.name, list(t.shape), t.type.name, t.n_bytes) for t in file.tensors.values()]
    assert [(row["name"], row["shape"], row["to"], row["bytes"]) for row in dry["tensors"]] == listed
    row = next(row for row in dry["tensors"] if row["name"] == "blk.0.attn_q.weight")
    assert (row["from"], row["to"], row["bits_per_weight"]) == ("F32", "Q4_K", 4.5)


def test_the_head_is_the_one_that_the_gguf_package_writes(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("a.int", 7)
    writer.add_float32("a.float", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "ä")
    writer.add_key_value("a.texts", ["x", "yz"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    writer.add_key_value("a.ints", [1, -2], GGUFValueType.ARRAY, GGUFValueType.INT32)
    writer.add_key_value("a.floats", [0.5, -2.0], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    for name, shape, type_ in (("a", (3, 5), "F32"), ("b", (2, 2, 64), "Q4_0"), ("c", (1,), "F16")):
        size = gguf_writer.Entry(name, shape, gguf_writer.TYPES[type_]).n_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, GGMLQuantizationType[type_])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.close()
    values = {
        "general.architecture": "llama", "a.int": 7, "a.float": 0.1, "a.bool": True, "a.text": "ä",
        "a.texts": ["x", "yz"], "a.ints": np.array([1, -2]), "a.floats": np.array([0.5, -2.0]),
    }  # fmt: skip
    entries = [
        gguf_writer.Entry("a", (3, 5), gguf_writer.TYPES["F32"]),
        gguf_writer.Entry("b", (2, 2, 64), gguf_writer.TYPES["Q4_0"]),
        gguf_writer.Entry("c", (1,), gguf_writer.TYPES["F16"]),
    ]
    head = gguf_writer.head([gguf_writer.field(*item) for item in values.items()], entries)
    assert head == (tmp_path / "theirs.gguf").read_bytes()
    assert gguf_writer.file_bytes([], entries) == len(gguf_writer.head([], entries)) + 64 + 160 + 32


@pytest.mark.slow
@pytest.mark.parametrize("type_", ASKED_FOR)
def test_a_real_model_is_requantized_as_libllama_does(smollm2: Path, tmp_path: Path, type_: str) -> None:
    theirs = by_libllama(smollm2, tmp_path / "theirs.gguf", type_, allow_requantize=True)
    quantized(smollm2, tmp_path / "ours.gguf", type_, threads=2, allow_requantize=True)
    assert (tmp_path / "ours.gguf").read_bytes() == theirs
