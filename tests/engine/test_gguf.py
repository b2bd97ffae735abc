"""The GGUF reader: what it reads is what was written and what the gguf package reads; the rest is refused."""

from __future__ import annotations

import errno
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from make_gguf import VALUE_TYPES, Typed, build_gguf, tiny_llama, write_gguf

import engine
from engine import gguf_fields
from engine.ggml_types import GGML_TYPES, by_name
from engine.gguf import StringArray

EXTREMES = {
    name: [False, True] if name == "bool" else [-1.5, 0.1, 3e38] if name[0] == "f" else
    [int(np.iinfo(dtype).min), 1, int(np.iinfo(dtype).max)]
    for name, (_, dtype) in VALUE_TYPES.items()
}  # fmt: skip
TENSORS = {
    "matrix": ("Q4_1", (3, 64), bytes(range(120))),
    "vector": ("F32", (5,), np.arange(5, dtype="<f4").tobytes()),
    "four": ("F16", (2, 3, 1, 4), np.arange(24, dtype="<f2").tobytes()),
}


def plain(value: Any) -> Any:
    """A metadata value as Python lists and scalars."""
    if isinstance(value, (np.ndarray, StringArray)):
        return value.tolist() if isinstance(value, np.ndarray) else value.to_list()
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def assert_equals_gguf_package(path: Path) -> None:
    with engine.open(path) as file:
        oracle = GGUFReader(path)
        fields = {key: field for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for key, field in fields.items():
            assert plain(file.metadata[key]) == field.contents(), key
        assert (file.version, file.alignment) == (oracle.fields["GGUF.version"].parts[0][0], oracle.alignment)
        assert file.data_offset == oracle.data_offset
        assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
        for ours, theirs in zip(file.tensors.values(), oracle.tensors, strict=True):
            assert ours.type.id == theirs.tensor_type
            assert ours.shape == tuple(reversed(theirs.shape.tolist()))
            assert (ours.offset, ours.n_bytes) == (theirs.data_offset, theirs.n_bytes)
            assert ours.data.tobytes() == theirs.data.tobytes()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny.gguf", type_name="Q4_1")


def test_types_equal_the_gguf_package() -> None:
    assert {t.id: (t.name, t.block_size, t.block_bytes) for t in GGML_TYPES.values()} == {
        t.value: (t.name, *GGML_QUANT_SIZES[t]) for t in GGML_QUANT_SIZES
    }
    assert by_name("Q4_1").id == 3
    with pytest.raises(ValueError, match=r"unknown ggml type 'Q4_9'.*Q4_1"):
        by_name("Q4_9")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", VALUE_TYPES)
def test_every_scalar_type_reads_back(tmp_path: Path, name: str, version: int) -> None:
    written = {f"k.{i}": Typed(name, value) for i, value in enumerate(EXTREMES[name])}
    written |= {"k.list": Typed(name, EXTREMES[name]), "k.none": Typed(name, [])}
    path = write_gguf(tmp_path / "f.gguf", written, {}, version=version)
    dtype = VALUE_TYPES[name][1]
    with engine.open(path) as file:
        assert file.version == version
        for key, (_, value) in written.items():
            got = file.metadata[key]
            if isinstance(value, list):
                assert isinstance(got, np.ndarray)
                assert got.dtype == dtype
                assert not got.flags.writeable
                np.testing.assert_array_equal(got, np.array(value, dtype))
            else:
                assert type(got) is {"f": float, "b": bool}.get(name[0], int)
                assert got == np.array(value, dtype).item()


def test_strings_are_decoded_on_access_only(tmp_path: Path) -> None:
    words = ["", "a", "Ġthe", "日本語", "\0nul", "x" * 1000]
    path = write_gguf(tmp_path / "f.gguf", {"one": "ü", "many": words, "none": Typed("str", [])}, {})
    with engine.open(path) as file:
        many = file.metadata["many"]
        assert isinstance(many, StringArray)
        assert (len(many), many.to_list(), list(many), many[-1], many[2:4]) == (
            6,
            words,
            words,
            words[-1],
            words[2:4],
        )
        assert many.raw(3) == "日本語".encode()
        assert "Ġthe" in many
        assert (file.metadata["one"], plain(file.metadata["none"])) == ("ü", [])
        for outside in (6, -7):
            with pytest.raises(IndexError, match="6 strings"):
                many[outside]


def test_string_that_is_not_utf8_spoils_only_its_own_access(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "f.gguf", {"k": ["good", b"\xff\xfe", "fine"]}, {})
    with engine.open(path) as file:
        strings = file.metadata["k"]
        assert (strings[0], strings[2], strings.raw(1)) == ("good", "fine", b"\xff\xfe")
        with pytest.raises(engine.GGUFFormatError, match="'k': string 1 is not UTF-8"):
            strings[1]


def test_nested_arrays_are_tuples_up_to_a_limit(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "f.gguf", {"k": [[1, 2], [3]], "s": [["a"], ["b", "c"]]}, {})
    with engine.open(path) as file:
        assert isinstance(file.metadata["k"], tuple)
        assert {key: plain(value) for key, value in file.metadata.items()} == {
            "k": [[1, 2], [3]],
            "s": [["a"], ["b", "c"]],
        }
    with pytest.raises(engine.GGUFFormatError, match="nested deeper than 4"):
        engine.open(write_gguf(tmp_path / "f.gguf", {"k": [[[[[1]]]]]}, {}))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tiny_files_equal_the_gguf_package(tmp_path: Path, version: int, alignment: int) -> None:
    metadata = {"general.alignment": alignment, "a.b": 7, "a.c": [1.5, 2.5], "s": "text", "t": ["x", "yy"]}
    assert_equals_gguf_package(write_gguf(tmp_path / "f.gguf", metadata, TENSORS, version=version))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_K", "Q6_K"])
def test_tiny_models_equal_the_gguf_package(tmp_path: Path, type_name: str) -> None:
    path = tiny_llama(tmp_path / "f.gguf", type_name=type_name, width=256, ff=256, tied=False, vocab=500)
    assert_equals_gguf_package(path)


def test_real_file_equals_the_gguf_package(smollm2: Path) -> None:
    assert_equals_gguf_package(smollm2)


@pytest.mark.alone
def test_real_file_opens_in_under_20_ms(smollm2: Path) -> None:
    import numba  # noqa: F401  (loads the kernel's path, as in a worker)

    def seconds() -> float:
        begun = time.perf_counter()
        file = engine.open(smollm2)
        took = time.perf_counter() - begun
        file.close()
        return took

    seconds()
    assert statistics.median(seconds() for _ in range(20)) < 0.02


def test_tensors_are_read_only_views_on_one_shared_mapping(tiny: Path) -> None:
    with engine.open(tiny) as file:
        tensors = list(file.tensors.values())
        first = tensors[0].data.ctypes.data - tensors[0].offset
        for tensor in tensors:
            assert not tensor.data.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                tensor.data.flags.writeable = True
            assert not tensor.data.flags.owndata
            assert tensor.data.ctypes.data - tensor.offset == first
        line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if str(tiny) in line)
        assert line.split()[1] == "r--s"  # PROT_READ, MAP_SHARED
        assert int(line.split("-")[0], 16) == first


def test_views_outlive_the_file_and_nothing_else_does(tiny: Path) -> None:
    with engine.open(tiny) as file:
        view = file.tensors["output_norm.weight"].data
        strings = file.metadata["tokenizer.ggml.tokens"]
        wanted = view.copy()
    file.close()
    np.testing.assert_array_equal(view, wanted)
    with pytest.raises(ValueError, match="closed"):
        _ = file.tensors
    del view
    other = engine.open(tiny)
    strings = other.metadata["tokenizer.ggml.tokens"]
    other.close()
    with pytest.raises(ValueError, match="closed"):
        strings[0]


def test_resident_bytes_are_whole_pages_of_the_file(tiny: Path) -> None:
    with engine.open(tiny) as file:
        assert sum(int(tensor.data.sum()) for tensor in file.tensors.values()) > 0  # touches every page
        pages = -(-file.n_bytes // os.sysconf("SC_PAGE_SIZE"))
        assert file.resident_bytes() == pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("n_strings", "length"), [(0, None), (1, None), (7, None), (7, 2**64 - 1), (7, 2**63), (7, 1000)]
)
@pytest.mark.parametrize("cut", [0, 1, 9])
def test_plain_walk_equals_kernel(n_strings: int, length: int | None, cut: int) -> None:
    from engine.kernels import strings

    words = [bytes([65 + i]) * i for i in range(n_strings)]
    data = bytearray(b"ab" + b"".join(len(word).to_bytes(8, "little") + word for word in words) + b"z")
    if length is not None:
        data[19:27] = length.to_bytes(8, "little")  # string 2 lies about its length
    whole = np.frombuffer(bytes(data[: max(2, len(data) - cut)]), np.uint8)
    plainly = gguf_fields.locate_strings_plainly(whole, 2, n_strings)
    kernel = np.zeros(n_strings + 1, np.int64)
    strings.locate_strings(whole, 2, kernel)
    np.testing.assert_array_equal(plainly, kernel)
    assert (kernel[-1] < 0) == (length is not None or (cut > 1 and n_strings > 0))
    assert len(getattr(strings.locate_strings, "signatures", "1")) == 1  # none without a compiler


def test_opening_loads_no_compiler(tiny: Path) -> None:
    code = "import sys, engine; engine.open(sys.argv[1]); assert not {'numba', 'llvmlite'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, tiny], check=True, timeout=60)


def test_tiny_model_loads_in_llama_cpp(tiny: Path) -> None:
    llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama (llama.cpp) is not installed")
    params = llama_cpp.LlamaModelParams()
    params.n_gpu_layers = 0
    model = llama_cpp.LlamaModel(str(tiny), params)
    vocabulary = model.get_vocab()  # valid while the model lives
    with engine.open(tiny) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert [tokens[i] for i in vocabulary.tokenize(" the cat", False, False)] == ["Ġthe", "Ġc", "at"]


def test_errors_of_opening_are_the_operating_systems(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        engine.open(tmp_path / "missing.gguf")
    with pytest.raises(IsADirectoryError, match=r"name the \.gguf file in it") as caught:
        engine.open(tmp_path)
    assert caught.value.errno == errno.EISDIR


def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(engine.GGUFFormatError, match="not a regular file"):
        engine.open(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; is the download complete"),
        (b"GG", "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PK\x03\x04 torch", "convert it to GGUF"),
        (b"hello world", "starts with b'hell', expected b'GGUF'"),
        (b"GGUF", r"the version needs 4 bytes but the file has 0 left \(at byte 4\); is the download"),
        (b"GGUF\1\0\0\0", "version 1, expected 2 or 3"),
        (b"GGUF\0\0\0\3" + bytes(16), "big-endian file of version 3.*gguf-convert-endian"),
        (b"GGUF\4\0\0\0" + bytes(16), "version 4, expected 2 or 3.*newer"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, "a header of 18,446,744,073,709,551,615 keys .* needs"),
    ],
)
def test_what_is_not_a_whole_gguf_file_is_refused_with_a_way_on(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(content)
    with pytest.raises(engine.GGUFFormatError, match=message) as caught:
        engine.open(path)
    assert str(path) in str(caught.value)


BROKEN = {
    "key is there twice": ([("a", 1), ("a", 2)], {}),
    "a key that is not UTF-8": ([(b"\xff", 1)], {}),
    "a string that is not UTF-8": ({"a": b"\xff"}, {}),
    "a key of 65,536 bytes": ({"k" * 65_536: 1}, {}),
    "a bool of value 2, expected 0 or 1": ({"a": Typed("u8", 2)}, {}),
    "an alignment of 3, expected a power of two": ({"general.alignment": 3}, {}),
    "an alignment of 0, expected a power of two": ({"general.alignment": 0}, {}),
    "an alignment of 'x', expected a power of two": ({"general.alignment": "x"}, {}),
    "the name is there twice": ({}, [("w", TENSORS["vector"]), ("w", TENSORS["vector"])]),
    "a tensor's name that is not UTF-8": ({}, [(b"\xff", TENSORS["vector"])]),
    "5 dimensions, expected 1 to 4": ({}, {"w": ("F32", (1, 1, 1, 1, 1), bytes(4))}),
    "0 dimensions, expected 1 to 4": ({}, {"w": ("F32", (), bytes(4))}),
    r"dimensions \(3, 0\) make 0 weights": ({}, {"w": ("F32", (3, 0), b"")}),
    r"expected 1 to 2\*\*63 - 1": ({}, {"w": ("F32", (2**63, 4), bytes(4))}),
    "rows of 33 weights, expected a multiple of Q4_1's block": ({}, {"w": ("Q4_1", (2, 33), bytes(40))}),
    "tensor 'w' ends at byte 224 but the file has 96; is the": ({}, {"w": ("F32", (40,), bytes(32))}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_file_is_refused_by_name_and_place(tmp_path: Path, message: str) -> None:
    metadata, tensors = BROKEN[message]
    built = build_gguf(metadata, tensors)
    if "bool" in message:
        built.data[built.fields[5].offset] = 7  # makes the u8 a bool
    path = tmp_path / "f.gguf"
    path.write_bytes(built.data)
    with pytest.raises(engine.GGUFFormatError, match=message) as caught:
        engine.open(path)
    assert str(path) in str(caught.value)
    assert "byte" in str(caught.value)


def test_bad_types_offsets_and_overlaps_are_refused(tmp_path: Path) -> None:
    def refused(kind: str, what: str, value: int, message: str) -> None:
        built = build_gguf({"k": 1, "flags": [True, False]}, TENSORS)
        at = next(f for f in built.fields if (f.kind, f.what) == (kind, what))
        built.data[at.offset : at.offset + at.size] = value.to_bytes(at.size, "little")
        (tmp_path / "f.gguf").write_bytes(built.data)
        with pytest.raises(engine.GGUFFormatError, match=message):
            engine.open(tmp_path / "f.gguf")

    refused("type", "k", 13, "key 'k': unknown value type 13")
    refused("type", "vector", 4, "tensor 'vector': unknown type 4, withdrawn")
    refused("offset", "vector", 1, "offset 1, expected a multiple of the alignment 32")
    refused("offset", "vector", 96, "tensors 'matrix' and 'vector': they overlap")
    refused("offset", "vector", 2**64 - 32, "'vector' ends at byte .* is the download complete")
    refused("items", "flags", 0x200, r"a bool of value 2 in an array, expected 0 or 1 \(at byte 71\)")
    refused("count", "flags", 2**63, "an array of 9,223,372,036,854,775,808 numbers needs")
