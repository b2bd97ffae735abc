"""Split models: the parts together are the whole, to the bit; missing and strange parts are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from make_gguf import ARRAY, STRING, Built, Typed, split_gguf, tiny_llama, write_gguf

import engine
from engine.gguf import Part
from engine.quants import decoder
from tests.engine.conftest import Scorer

TOKENS = np.random.default_rng(5).integers(0, 300, 100).astype(np.int32)
GIB = 1 << 30


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "m.gguf", type_name="Q4_1", tied=False)


def n_tensors(path: Path) -> int:
    with engine.open(path) as file:
        return len(file.tensors)


def n_open() -> int:
    """Open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7, "all"])
def test_parts_together_are_the_whole(whole: Path, tmp_path: Path, n_parts: int | str) -> None:
    count = n_tensors(whole) if n_parts == "all" else int(n_parts)
    parts = split_gguf(whole, tmp_path, count)
    with engine.open(whole) as one, engine.open(parts[0]) as many:
        assert many.paths == tuple(map(str, parts))
        assert (many.path, many.n_bytes) == (str(parts[0]), sum(path.stat().st_size for path in parts))
        assert list(one.metadata) == [key for key in many.metadata if not key.startswith("split.")]
        assert list(many.tensors) == list(one.tensors)
        for ours, theirs in zip(many.tensors.values(), one.tensors.values(), strict=True):
            assert (ours.name, ours.type, ours.shape) == (theirs.name, theirs.type, theirs.shape)
            assert ours.data.tobytes() == theirs.data.tobytes()
            assert not ours.data.flags.writeable
        assert one.resident_bytes() <= many.resident_bytes()
        assert [many.tensors[name].part for name in many.tensors] == sorted(
            tensor.part for tensor in many.tensors.values()
        )


def test_each_part_is_what_the_gguf_package_reads(whole: Path, tmp_path: Path) -> None:
    parts = split_gguf(whole, tmp_path, 3)
    with engine.open(parts[0]) as file:
        rest = dict(file.tensors)
        for rank, path in enumerate(parts):
            oracle = GGUFReader(path)
            assert oracle.fields["split.no"].contents() == rank
            assert oracle.fields["split.count"].contents() == 3
            assert oracle.fields["split.tensors.count"].contents() == len(file.tensors)
            for theirs in oracle.tensors:
                ours = rest.pop(theirs.name)
                assert (ours.part, ours.offset, ours.n_bytes) == (rank, theirs.data_offset, theirs.n_bytes)
                assert ours.data.tobytes() == theirs.data.tobytes()
        assert not rest


@pytest.mark.parametrize("alignment", [8, 256])
def test_later_parts_are_aligned_as_they_say_themselves(tmp_path: Path, alignment: int) -> None:
    whole = tiny_llama(tmp_path / "m.gguf", **{"general.alignment": alignment})
    parts = split_gguf(whole, tmp_path, 3)
    np.testing.assert_array_equal(Scorer(parts[0]).score(TOKENS), Scorer(whole).score(TOKENS))


@pytest.mark.parametrize("n_parts", [2, 5])
def test_scores_of_parts_are_the_wholes_bits(whole: Path, tmp_path: Path, n_parts: int) -> None:
    parts = split_gguf(whole, tmp_path, n_parts)
    np.testing.assert_array_equal(Scorer(parts[0]).score(TOKENS), Scorer(whole).score(TOKENS))


def test_llama_cpp_computes_the_same_with_parts(whole: Path, tmp_path: Path) -> None:
    llama = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama (llama.cpp) is not installed")

    class Model(llama.LlamaModel):  # get_logits_ith asks for it
        n_vocab = 300

    def logits(path: Path) -> np.ndarray:
        params = llama.LlamaModelParams()
        params.n_gpu_layers = 0
        model = Model(str(path), params)
        context = llama.LlamaContext(model, llama.LlamaContextParams())
        context.decode(llama.llama_batch_get_one([int(token) for token in TOKENS[:20]], 0))
        return np.array(context.get_logits_ith(-1))

    parts = split_gguf(whole, tmp_path, 3)
    np.testing.assert_array_equal(logits(parts[0]), logits(whole))


def test_links_to_parts_elsewhere_are_found_by_their_own_names(whole: Path, tmp_path: Path) -> None:
    """As in caches that keep files under their digest."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for i, part in enumerate(split_gguf(whole, tmp_path, 2)):
        part.rename(tmp_path / "blobs" / str(i))
        (tmp_path / "snapshot" / part.name).symlink_to(tmp_path / "blobs" / str(i))
    with engine.open(tmp_path / "snapshot" / "m-00001-of-00002.gguf") as file:
        assert len(file.tensors) == n_tensors(whole)


def test_relative_path_and_odd_name_find_their_parts(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = whole.rename(tmp_path / "a b=c,-00001-of-00002.gguf\n.gguf")
    parts = split_gguf(odd, tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    with engine.open(parts[0].name) as file:
        assert file.paths == (parts[0].name, parts[1].name)


def test_merged_file_that_kept_its_keys_is_whole(whole: Path, tmp_path: Path) -> None:
    """gguf-split --merge leaves split.count = 0 behind."""
    merged = split_gguf(whole, tmp_path, 1, changes={0: {"split.count": Typed("u16", 0)}})[0]
    with engine.open(merged.rename(tmp_path / "merged.gguf")) as file:
        assert file.paths == (str(tmp_path / "merged.gguf"),)


def test_later_part_is_refused_and_names_the_first(whole: Path, tmp_path: Path) -> None:
    parts = split_gguf(whole, tmp_path, 3)
    for no in (1, 2):
        with pytest.raises(engine.GGUFFormatError, match=f"part {no + 1} of 3; open the first one") as caught:
            engine.open(parts[no])
        assert str(parts[0]) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        engine.open(tmp_path / "other-00001-of-00003.gguf")


def test_missing_parts_are_named(whole: Path, tmp_path: Path) -> None:
    parts = split_gguf(whole, tmp_path, 7)
    parts[2].unlink()
    with pytest.raises(
        engine.GGUFFormatError, match=r"first of 7 parts, but beside it is no m-00003-of-00007\.gguf; "
    ):
        engine.open(parts[0])
    for part in parts[3:]:
        part.unlink()
    with pytest.raises(
        engine.GGUFFormatError, match=r"m-00003.*, m-00004.*, m-00005-of-00007\.gguf and more; is the"
    ):
        engine.open(parts[0])


def test_part_under_another_name_is_told_its_own(whole: Path, tmp_path: Path) -> None:
    first = split_gguf(whole, tmp_path, 2)[0]
    for name in ("model.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf"):
        with pytest.raises(engine.GGUFFormatError, match=r"rename it to (m|model)-00001-of-00002\.gguf"):
            engine.open(shutil.copy(first, tmp_path / name))


STRANGERS: dict[str, dict[int, dict[str, Any]]] = {
    "00002-of-00003.gguf: split.count is 4, expected 3 as in m-00001": {1: {"split.count": Typed("u16", 4)}},
    "00003-of-00003.gguf: split.no is 1, expected 2 as in": {2: {"split.no": Typed("u16", 1)}},
    "00002-of-00003.gguf: split.no is missing, expected 1": {1: {"split.no": None}},
    "00002-of-00003.gguf: split.count is True, expected 3": {1: {"split.count": True}},
    "00002-of-00003.gguf: split.tensors.count is 9, expected": {1: {"split.tensors.count": Typed("i32", 9)}},
    "00003-of-00003.gguf: general.architecture is 'mamba', expected 'llama' as in": {
        2: {"general.architecture": "mamba"}
    },
    "00003-of-00003.gguf: general.architecture is array": {2: {"general.architecture": [1, 2]}},
    r"its 3 parts hold \d+ tensors, expected 9 \(split.tensors.count\)": {
        rank: {"split.tensors.count": Typed("i32", 9)} for rank in range(3)
    },
    "split.count is 70000, expected an integer from 0 to 65,535": {0: {"split.count": 70_000}},
    "split.count is -3, expected an integer": {0: {"split.count": Typed("i16", -3)}},
    "split.count is 'three', expected an integer": {0: {"split.count": "three"}},
    "split.count is array.*, expected an integer": {0: {"split.count": [1, 2]}},
    "split.no is 3, expected an integer from 0 to 2": {0: {"split.no": Typed("u16", 3)}},
    "split.no is missing": {0: {"split.no": None}},
    "split.tensors.count is -1, expected": {0: {"split.tensors.count": Typed("i32", -1)}},
}


@pytest.mark.parametrize("message", STRANGERS)
def test_parts_of_different_models_are_refused(whole: Path, tmp_path: Path, message: str) -> None:
    parts = split_gguf(whole, tmp_path, 3, changes=STRANGERS[message])
    with pytest.raises(engine.GGUFFormatError, match=message):
        engine.open(parts[0])


def test_tensor_in_two_parts_is_refused(whole: Path, tmp_path: Path) -> None:
    parts = split_gguf(whole, tmp_path, 2)
    with engine.open(parts[0]) as file:
        name, tensor = next(iter(file.tensors.items()))
        twice = {name: (tensor.type.name, tensor.shape, tensor.data.tobytes())}
        keys = {key: Typed("u16", n) for key, n in (("split.no", 1), ("split.count", 2))}
    write_gguf(parts[1], keys, twice)
    with pytest.raises(
        engine.GGUFFormatError, match=rf"00002-of-00002\.gguf: tensor '{name}' is there already in m-00001"
    ):
        engine.open(parts[0])


@pytest.mark.parametrize("broken", ["cut", "garbage", "empty", "folder"])
def test_broken_part_is_named_and_nothing_stays_open(whole: Path, tmp_path: Path, broken: str) -> None:
    parts = split_gguf(whole, tmp_path, 3)
    if broken == "cut":
        os.truncate(parts[2], parts[2].stat().st_size - 100)
    elif broken != "folder":
        parts[2].write_bytes(b"" if broken == "empty" else b"hello world")
    else:
        parts[2].unlink()
        parts[2].mkdir()
    before = n_open()
    with pytest.raises((engine.GGUFFormatError, IsADirectoryError)) as caught:
        engine.open(parts[0])
    assert str(parts[2]) in str(caught.value)
    # while the exception lives, and its frames with it
    assert "m-00001-of" not in Path("/proc/self/maps").read_text()
    assert "m-00002-of" not in Path("/proc/self/maps").read_text()
    del caught
    assert "-of-00003.gguf" not in Path("/proc/self/maps").read_text()
    assert n_open() == before


def test_headers_of_all_parts_share_one_budget(tmp_path: Path) -> None:
    """Each of two headers costs 20 MB; a model's may cost 32 MiB."""
    n_strings = 2_500_000
    for rank in range(2):
        built = Built(bytearray(b"GGUF"))
        for type_, value in (("u32", 3), ("u64", 0), ("u64", 3)):
            built.put("", "", type_, value)
        for key, number in (("split.no", rank), ("split.count", 2)):
            built.put_text(key, key)
            built.put_value(key, Typed("u16", number))
        built.put_text("k", "k")
        for type_, value in (("u32", ARRAY), ("u32", STRING), ("u64", n_strings)):
            built.put("", "", type_, value)
        with (tmp_path / f"m-0000{rank + 1}-of-00002.gguf").open("wb") as file:
            file.write(built.data)
            file.truncate(len(built.data) + 8 * n_strings)  # empty strings
    Part(str(tmp_path / "m-00002-of-00002.gguf")).close()
    with pytest.raises(engine.GGUFFormatError, match=r"00002-of.*: key 'k': indexing .* more than 32 MiB"):
        engine.open(tmp_path / "m-00001-of-00002.gguf")


def test_parts_of_many_gibibytes_open_in_constant_memory(tmp_path: Path) -> None:
    """Three sparse parts of 6 GiB: rows that lie beyond 4 GiB are read in their place."""
    columns, rows = 4096, 3 * GIB // 4 // 4096
    tensor_bytes = 4 * rows * columns
    assert tensor_bytes == 3 * GIB
    numbers = np.arange(columns, dtype="<f4")
    for rank in range(3):
        built = Built(bytearray(b"GGUF"))
        for type_, value in (("u32", 3), ("u64", 2), ("u64", 3)):
            built.put("", "", type_, value)
        for key, number in (("split.no", rank), ("split.count", 3), ("split.tensors.count", 6)):
            built.put_text(key, key)
            built.put_value(key, Typed("u16", number))
        for i in range(2):
            built.put_tensor(f"part{rank}.w{i}", 0, (rows, columns), i * tensor_bytes)
        built.pad(32)
        with (tmp_path / f"big-0000{rank + 1}-of-00003.gguf").open("wb") as file:
            file.write(built.data)
            for i in range(2):  # the last row of each tensor
                file.seek(len(built.data) + (i + 1) * tensor_bytes - 4 * columns)
                file.write((numbers + 10 * rank + i).astype("<f4").tobytes())

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with engine.open(tmp_path / "big-00001-of-00003.gguf") as file:
        assert resident() - before < 4 << 20
        assert file.n_bytes > 18 * GIB
        assert len(file.tensors) == 6
        out = np.empty(columns, np.float32)
        for rank in range(3):
            for i in range(2):
                tensor = file.tensors[f"part{rank}.w{i}"]
                assert (tensor.part, tensor.n_bytes) == (rank, tensor_bytes)
                decoder("F32")(tensor.data, (rows - 1) * columns, columns, out)
                np.testing.assert_array_equal(out, numbers + 10 * rank + i)
        assert file.tensors["part2.w1"].offset + tensor_bytes > 6 * GIB
