"""Files of importance matrices: ggml's own bytes, libgguf's reading of them, and what is refused."""

from __future__ import annotations

import ctypes
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from make_gguf import Typed, tiny_llama, write_gguf

from pipeline.errors import ModelError, StorageFailure
from pipeline.quantize.imatrix_file import Sums, read_imatrix, write_imatrix

METADATA = {
    "general.type": "imatrix",
    "imatrix.datasets": Typed("str", ["wikitext2"]),
    "imatrix.chunk_count": 7,
    "imatrix.chunk_size": 512,
}


def entries(seed: int = 0) -> dict[str, Sums]:
    """Two plain matrices, and a stack of three experts of which one saw nothing; not in order of names."""
    rng = np.random.default_rng(seed)

    def sums(*shape: int) -> np.ndarray:
        return rng.uniform(0, 1e4, shape).astype(np.float32)

    return {
        "blk.1.attn_q.weight": Sums(sums(1, 37), np.array([3584], np.float32)),
        "blk.0.ffn_up_exps.weight": Sums(sums(3, 8), np.array([7, 0, 3577], np.float32)),
        "blk.0.attn_q.weight": Sums(sums(1, 64), np.array([3584], np.float32)),
    }


def tensors(given: dict[str, Sums]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """For `write_gguf`."""
    return {
        f"{name}.{part}": ("F32", shape, values.tobytes())
        for name, (sums, counts) in given.items()
        for part, shape, values in (("in_sum2", sums.shape, sums), ("counts", (counts.size, 1), counts))
    }


def binary(given: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    """A .dat: per name its calls and its values."""
    raw = struct.pack("<i", len(given))
    for name, (n_calls, values) in given.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, values.size)
        raw += values.astype("<f4").tobytes()
    return raw + tail


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, given = tmp_path / "i.gguf", entries()
    sha256 = write_imatrix(path, given, ["a", "ünï"], 7, 512)
    found = read_imatrix(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("a", "ünï"), 7, 512)
    assert list(found.entries) == sorted(given)
    for name, (sums, counts) in given.items():
        assert np.array_equal(found.entries[name].sums, sums)
        assert np.array_equal(found.entries[name].counts, counts)


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    given = entries()
    turned = dict(reversed(given.items()))
    a = write_imatrix(tmp_path / "a", given, ["t"], 7, 512)
    assert a == write_imatrix(tmp_path / "other name", turned, ["t"], 7, 512)
    assert a == write_imatrix(tmp_path / "a", given, ["t"], 7, 512), "a file that is there is replaced"
    assert a != write_imatrix(tmp_path / "c", entries(1), ["t"], 7, 512)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "other name"]


def test_the_bytes_are_those_that_ggml_writes(tmp_path: Path) -> None:
    """libggml's own gguf writer, called as llama-imatrix calls it."""
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python (extra `bench`) brings libggml")
    library = next(iter((Path(package.__file__).parent / "lib").glob("libggml-base.so")), None)
    if library is None:
        pytest.skip("this llama-cpp-python has no libggml-base.so beside it")
    given = entries()
    write_imatrix(tmp_path / "ours", given, ["wikitext2", "ünï"], 7, 512)
    write_by_ggml(library, tmp_path / "theirs", given, ["wikitext2", "ünï"], 7, 512)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def write_by_ggml(library: Path, path: Path, given: dict[str, Sums], datasets, count: int, size: int) -> None:
    ggml, pointer, text = ctypes.CDLL(str(library)), ctypes.c_void_p, ctypes.c_char_p

    def call(name: str, result, *arguments):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, [type(argument) for argument in arguments]
        return function(*arguments)

    class Params(ctypes.Structure):
        _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool))

    context = pointer(call("ggml_init", pointer, Params(1 << 20, None, False)))
    file = pointer(call("gguf_init_empty", pointer))
    call("gguf_set_val_str", None, file, text(b"general.type"), text(b"imatrix"))
    names = (text * len(datasets))(*(name.encode() for name in datasets))
    n_names = ctypes.c_size_t(len(datasets))
    call("gguf_set_arr_str", None, file, text(b"imatrix.datasets"), names, n_names)
    call("gguf_set_val_u32", None, file, text(b"imatrix.chunk_count"), ctypes.c_uint32(count))
    call("gguf_set_val_u32", None, file, text(b"imatrix.chunk_size"), ctypes.c_uint32(size))
    for name, (sums, counts) in sorted(given.items()):
        for part, values in (("in_sum2", sums), ("counts", counts[:, None])):
            n_rows, columns = (ctypes.c_int64(n) for n in values.shape)
            tensor = pointer(call("ggml_new_tensor_2d", pointer, context, ctypes.c_int(0), columns, n_rows))
            call("ggml_set_name", pointer, tensor, text(f"{name}.{part}".encode()))
            raw = values.tobytes()
            ctypes.memmove(call("ggml_get_data_f32", pointer, tensor), raw, len(raw))
            call("gguf_add_tensor", None, file, tensor)
    assert call("gguf_write_to_file", ctypes.c_bool, file, text(str(path).encode()), ctypes.c_bool(False))
    call("gguf_free", None, file)
    call("ggml_free", None, context)


def test_weights_are_those_that_libgguf_reads(tmp_path: Path) -> None:
    libgguf = pytest.importorskip("libgguf")
    path, given = tmp_path / "i.gguf", entries()
    write_imatrix(path, given, ["t"], 7, 512)
    found, oracle = read_imatrix(path), libgguf.imatrix.load_imatrix(path)
    assert oracle.keys() == given.keys()
    for name, (sums, counts) in given.items():
        n, columns = sums.shape
        own = [found.weights(name, columns, matrix=i, n_matrices=n) for i in range(n)]
        assert np.array_equal(np.concatenate(own), oracle[name])
        assert own[0].dtype == np.float32
        assert counts.all() or np.array_equal(own[1], np.ones(columns, np.float32)), "nothing seen weighs 1"


def test_weights_of_the_older_format_are_those_that_libgguf_reads(tmp_path: Path) -> None:
    libgguf = pytest.importorskip("libgguf")
    rng = np.random.default_rng(3)
    given = {
        "blk.0.attn_q.weight": (21, rng.uniform(0, 9, 64)),
        "blk.0.ffn_up_exps.weight": (7, rng.uniform(0, 9, 24)),
        "blk.1.attn_q.weight": (0, rng.uniform(0, 9, 5)),
    }
    path = tmp_path / "i.dat"
    for tail in (b"", struct.pack("<ii", 21, 5) + b"a.txt"):
        path.write_bytes(binary(given, tail))
        found, oracle = read_imatrix(path), libgguf.imatrix.load_imatrix(path)
        assert (found.chunk_count, found.datasets) == ((21, ("a.txt",)) if tail else (0, ()))
        assert np.array_equal(found.weights("blk.0.attn_q.weight", 64), oracle["blk.0.attn_q.weight"])
        assert np.array_equal(found.weights("blk.1.attn_q.weight", 5), oracle["blk.1.attn_q.weight"])
        experts = [
            found.weights("blk.0.ffn_up_exps.weight", 8, matrix=i, n_matrices=3).tolist() for i in range(3)
        ]
        assert experts == oracle["blk.0.ffn_up_exps.weight"].reshape(3, 8).tolist()


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    import gguf

    path, given = tmp_path / "i.gguf", entries()
    write_imatrix(path, given, ["t"], 7, 512)
    reader = gguf.GGUFReader(path)
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    assert "general.architecture" not in reader.fields
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, (sums, counts) in given.items():
        assert np.array_equal(found[f"{name}.in_sum2"].data.reshape(sums.shape), sums)
        assert np.array_equal(found[f"{name}.counts"].data.reshape(-1), counts)
    stack = found["blk.0.ffn_up_exps.weight.counts"]
    assert stack.shape.tolist() == [1, 3], "ggml's order, fastest first"


def test_weights_of_an_unknown_tensor_are_none_and_of_another_shape_refused(tmp_path: Path) -> None:
    given = {"blk.0.attn_q.weight": Sums(np.ones((1, 64), np.float32), np.ones(1, np.float32))}
    given["token_embd.weight"] = given["blk.0.attn_q.weight"]
    write_imatrix(tmp_path / "i.gguf", given, ["t"], 1, 512)
    found = read_imatrix(tmp_path / "i.gguf")
    assert found.weights("blk.7.attn_q.weight", 64) is None
    assert found.weights("token_embd.weight", 32) is None, "as llama-quantize"
    with pytest.raises(ModelError, match=r"i\.gguf: blk\.0\.attn_q\.weight has 64 columns") as caught:
        found.weights("blk.0.attn_q.weight", 96)
    assert "expected 96: it was made for another model" in str(caught.value)
    with pytest.raises(ModelError, match="expected 192"):
        found.weights("blk.0.attn_q.weight", 64, n_matrices=3)


def test_tensors_of_other_statistics_are_passed_over(tmp_path: Path) -> None:
    given = entries()
    more = {"blk.0.attn_q.weight.in_sum": ("F32", (1, 64), bytes(256)), "stray": ("F32", (2,), bytes(8))}
    write_gguf(tmp_path / "i.gguf", METADATA, tensors(given) | more)
    assert read_imatrix(tmp_path / "i.gguf").entries.keys() == given.keys()


ONE = {"w": Sums(np.ones((1, 4), np.float32), np.ones(1, np.float32))}


def changed(part: str, values: list[float]) -> dict[str, Sums]:
    shape = getattr(ONE["w"], part).shape
    return {"w": ONE["w"]._replace(**{part: np.array(values, np.float32).reshape(shape)})}


@pytest.mark.parametrize(
    ("metadata", "given", "said"),
    [
        (METADATA | {"general.type": "model"}, tensors(ONE), "general.type is 'model', expected 'imatrix'"),
        ({"general.type": "imatrix"}, tensors(ONE), "has no key imatrix.datasets"),
        (METADATA | {"imatrix.chunk_count": "7"}, tensors(ONE), "expected texts and two numbers"),
        (METADATA | {"imatrix.datasets": [1, 2]}, tensors(ONE), "expected texts and two numbers"),
        (METADATA, {"stray": ("F32", (2,), bytes(8))}, "holds no sums"),
        (METADATA, {"w.in_sum2": ("F32", (1, 4), bytes(16))}, "w.in_sum2 has no counts beside it"),
        (METADATA, {"w.counts": ("F32", (1, 1), bytes(4))}, "w.counts has no sums beside it"),
        (METADATA, tensors(ONE) | {"w.counts": ("F16", (1, 1), bytes(2))}, "w.counts is F16, expected F32"),
        (METADATA, tensors(ONE) | {"w.counts": ("F32", (2, 1), bytes(8))}, "has 2 numbers, expected 1"),
        (METADATA, tensors(changed("sums", [1, 2, np.nan, 4])), "w: the sum at 2 is nan"),
        (METADATA, tensors(changed("sums", [1, np.inf, 3, 4])), "w: the sum at 1 is inf"),
        (METADATA, tensors(changed("sums", [-1, 2, 3, 4])), "w: the sum at 0 is -1.0"),
        (METADATA, tensors(changed("counts", [np.nan])), "w.counts: [nan]"),
        (METADATA, tensors(changed("counts", [-3])), "w.counts: [-3.0]"),
    ],
)
def test_a_gguf_file_that_is_no_sound_imatrix_is_refused(tmp_path: Path, metadata, given, said: str) -> None:
    write_gguf(tmp_path / "i.gguf", metadata, given)
    with pytest.raises(ModelError) as caught:
        read_imatrix(tmp_path / "i.gguf")
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "i.gguf"))
    assert caught.value.hint


def test_what_is_no_imatrix_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such") as caught:
        read_imatrix(tmp_path / "no-such")
    assert caught.value.kind == "FileNotFoundError"
    with pytest.raises(ModelError):
        read_imatrix(tmp_path)
    tiny_llama(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"has no key imatrix\.datasets"):
        read_imatrix(tmp_path / "model.gguf")
    write_imatrix(tmp_path / "i.gguf", entries(), ["t"], 7, 512)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "i.gguf").read_bytes()[:-40])
    with pytest.raises(ModelError) as caught:
        read_imatrix(tmp_path / "cut.gguf")
    assert caught.value.kind == "GGUFFormatError"


def test_a_binary_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    tail = struct.pack("<ii", 21, 5) + b"a.txt"
    whole = binary({"blk.0.attn_q.weight": (21, np.ones(6)), "b": (3, np.ones(2))}, tail)
    without_tail = len(whole) - len(tail)
    for length in set(range(len(whole))) - {without_tail}:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"i\.dat: "):
            read_imatrix(path)
    for length in (without_tail, len(whole)):
        path.write_bytes(whole[:length])
        assert read_imatrix(path).entries.keys() == {"blk.0.attn_q.weight", "b"}
    no_text = struct.pack("<ii", 1, 4) + b"\xff\xfe\xff\xfe"
    for foreign in (b"PK\x03\x04" + bytes(64), no_text + bytes(64), bytes(64)):
        path.write_bytes(foreign)
        with pytest.raises(ModelError):
            read_imatrix(path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match="cannot be written"):
        write_imatrix(tmp_path / "none" / "i.gguf", entries(), ["t"], 7, 512)
    for bad in ({}, {"w": Sums(np.ones((2, 4), np.float32), np.ones(1, np.float32))}):
        with pytest.raises(ValueError, match=r"without entries|w: sums"):
            write_imatrix(tmp_path / "i.gguf", bad, ["t"], 7, 512)
    assert list(tmp_path.iterdir()) == []
