"""The ways into memory: same bytes and scores, the memory that each promises, nothing left of a failure."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from make_gguf import split_gguf, tiny_llama

import engine
from engine import gguf, mapping
from engine.mapping import LOAD_MODES, Prefetch, Region
from pipeline.memory import process_memory
from pipeline.settings import LOAD_MODES as SETTINGS_LOAD_MODES

TOKENS = np.random.default_rng(7).integers(0, 300, 60).astype(np.int32)
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of some MB, whole and in parts."""
    whole = tiny_llama(tmp_path / "m.gguf", vocab=4000, width=256)
    return split_gguf(whole, tmp_path, 3)[0] if request.param == 3 else whole


def nll(file: engine.GGUFFile) -> np.ndarray:
    model = engine.load_model(file)
    batch = engine.Batch(TOKENS, np.arange(TOKENS.size), targets=[*TOKENS[1:], -1])
    return model.nll(batch, model.new_cache(1, TOKENS.size))


def in_maps(text: str) -> bool:
    return text in Path("/proc/self/maps").read_text()


def whole_pages(file: engine.GGUFFile) -> int:
    return sum(-(-Path(path).stat().st_size // PAGE) * PAGE for path in file.paths)


@pytest.mark.parametrize("load", LOAD_MODES)
def test_bytes_and_scores_are_the_same_in_every_mode(path: Path, load: str) -> None:
    with engine.open(path) as plain, engine.open(path, load=load) as file:
        assert file.load == load
        assert list(file.tensors) == list(plain.tensors)
        assert list(file.metadata) == list(plain.metadata)
        for ours, theirs in zip(file.tensors.values(), plain.tensors.values(), strict=True):
            assert ours.data.tobytes() == theirs.data.tobytes()
            assert not ours.data.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                ours.data.flags.writeable = True
        assert (
            engine.Tokenizer(file).encode("the cat").tolist()
            == engine.Tokenizer(plain).encode("the cat").tolist()
        )
        np.testing.assert_array_equal(nll(file), nll(plain))


@pytest.mark.parametrize("load", ["mmap", "populate", "mlock", "prefetch"])
def test_mapped_modes_share_the_page_cache(path: Path, load: str) -> None:
    anonymous = int(process_memory(path)["anonymous_bytes"])
    with engine.open(path, load=load) as file:
        memory = process_memory(*file.paths)
        assert memory["mapped_bytes"] == whole_pages(file)
        assert int(memory["anonymous_bytes"]) - anonymous < MIB
        if load in ("populate", "mlock"):
            assert memory["rss_bytes"] == file.resident_bytes() == whole_pages(file)
        assert memory["locked_bytes"] == (memory["pss_bytes"] if load == "mlock" else 0)
    assert process_memory(*file.paths)["mapped_bytes"] == 0


def test_copy_is_memory_of_the_process_and_is_given_back(path: Path) -> None:
    anonymous = int(process_memory(path)["anonymous_bytes"])
    with engine.open(path, load="copy") as file:
        memory = process_memory(*file.paths)
        assert memory["mapped_bytes"] == 0
        assert (
            0 <= int(memory["anonymous_bytes"]) - anonymous - file.n_bytes < (2 * len(file.paths) + 1) * MIB
        )
        assert file.resident_bytes() == whole_pages(file)
    assert abs(int(process_memory(path)["anonymous_bytes"]) - anonymous) < 2 * MIB


def test_copy_needs_the_file_no_more(path: Path) -> None:
    with engine.open(path) as plain:
        expected = nll(plain)
    with engine.open(path, load="copy") as file:
        for part in file.paths:
            os.truncate(part, 0)  # a mapping's reader would die of SIGBUS
        np.testing.assert_array_equal(nll(file), expected)


def test_copy_cannot_be_written_by_a_wild_pointer(path: Path) -> None:
    code = (
        "import ctypes, sys, engine; file = engine.open(sys.argv[1], load='copy');"
        "tensor = next(iter(file.tensors.values())); ctypes.memset(tensor.data.ctypes.data, 0, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], timeout=60)
    assert done.returncode == -11


def test_copy_longer_than_one_read_is_whole(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 3 * mapping.COPY_BYTES + 5, np.uint8).tobytes()
    (tmp_path / "f").write_bytes(content)
    region = Region(str(tmp_path / "f"), copy=True)
    assert region.whole.tobytes() == content
    region.close()


def test_copy_of_a_file_that_shrinks_is_refused() -> None:
    view = memoryview(bytearray(100))
    with pytest.raises(engine.GGUFFormatError, match=r"f: ended at byte 40 while it was read, expected 100"):
        mapping.read_into(io.BytesIO(bytes(40)), view, "f")


def test_failed_copy_gives_its_memory_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(file: object, view: memoryview, name: str) -> None:
        view[:] = bytes(len(view))
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    monkeypatch.setattr(mapping, "read_into", fails)
    anonymous = int(process_memory(path)["anonymous_bytes"])
    with pytest.raises(OSError, match="Input/output error") as caught:
        engine.open(path, load="copy")
    assert caught.value.filename == str(path)
    assert int(process_memory(path)["anonymous_bytes"]) - anonymous < MIB
    assert not in_maps(path.name)


def test_bad_header_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f.gguf").write_bytes(b"hello world")

    def never(*arguments: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(mapping, "read_into", never)
    monkeypatch.setattr(gguf, "bring_in", never)
    for load in LOAD_MODES:
        with pytest.raises(engine.GGUFFormatError, match="not a GGUF file"):
            engine.open(tmp_path / "f.gguf", load=load)


def test_populate_touches_pages_where_the_kernel_knows_no_better(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "MADV_POPULATE_READ", 9999)
    with engine.open(path, load="populate") as file:
        assert process_memory(*file.paths)["rss_bytes"] == whole_pages(file)


LOCKED = """
import ctypes, resource, sys
import engine
if not resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == 0:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
data = (ctypes.c_uint32 * 6)()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.capget(header, data) == 0
data[0] &= ~(1 << 14)  # CAP_IPC_LOCK knows no limit
assert libc.capset(header, data) == 0
try:
    engine.open(sys.argv[1], load="mlock")
except engine.CapacityError as error:
    held = error  # its frames keep nothing
    assert ".gguf" not in open("/proc/self/maps").read()
    print(held)
"""


def test_mlock_beyond_the_limit_says_how_to_raise_it_and_leaves_nothing(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCKED, path], capture_output=True, text=True, timeout=60, check=True
    )
    assert f"{path}: " in done.stdout
    assert "bytes cannot be locked (Cannot allocate memory); the process may lock 65,536 bytes" in done.stdout
    assert "ulimit -l unlimited" in done.stdout
    assert "LimitMEMLOCK=infinity" in done.stdout


@pytest.mark.parametrize("load", ["", "MMAP", "mmpa", "direct"])
def test_unknown_mode_is_refused_by_name(path: Path, load: str) -> None:
    with pytest.raises(
        ValueError, match=f"load={load!r}; expected one of mmap, populate, mlock, copy, prefetch"
    ):
        engine.open(path, load=load)


def test_settings_know_the_same_modes() -> None:
    assert SETTINGS_LOAD_MODES == LOAD_MODES


def cold(path: Path) -> int:
    """Drops the file from the page cache; bytes still in it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    region = Region(str(path))
    resident = region.resident_bytes()
    region.close()
    return resident


def test_prefetch_has_a_cold_file_read_without_a_touch(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(24 * MIB))
    if cold(path):
        pytest.skip("this file system keeps its pages: it lies in memory")
    Prefetch([str(path)]).wait()
    region = Region(str(path))
    for _ in range(1000):  # asked for; the disk may be slow
        if region.resident_bytes() == 24 * MIB:
            break
        threading.Event().wait(0.01)
    assert region.resident_bytes() == 24 * MIB
    region.close()


def test_prefetch_ends_with_its_file_and_fails_at_nothing(path: Path) -> None:
    file = engine.open(path, load="prefetch")
    file.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    Prefetch([str(path.with_name("none"))]).wait()


def test_prefetch_stops_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked, told = tmp_path / "f", [], threading.Event()
    path.write_bytes(bytes(MIB))

    def advise(descriptor: int, at: int, n_bytes: int, advice: int) -> None:
        asked.append(at)
        told.wait(10)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(mapping, "read_ahead_bytes", lambda device: PAGE)
    prefetch = Prefetch([str(path)])
    threading.Timer(0.05, told.set).start()
    prefetch.stop()
    assert len(asked) <= MIB // PAGE // 2


def test_read_ahead_is_the_devices_but_never_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_BDI", tmp_path)
    for device, told in ((os.makedev(8, 1), "4096"), (os.makedev(8, 2), "128"), (os.makedev(8, 3), "x")):
        folder = tmp_path / f"{os.major(device)}:{os.minor(device)}"
        folder.mkdir()
        (folder / "read_ahead_kb").write_text(told)
    sizes = [mapping.read_ahead_bytes(os.makedev(8, minor)) for minor in (1, 2, 3, 4)]
    assert sizes == [4 * MIB, mapping.READ_AHEAD_BYTES, mapping.READ_AHEAD_BYTES, mapping.READ_AHEAD_BYTES]
