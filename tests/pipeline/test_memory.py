"""Laws of `process_memory`: whose pages are counted, and how they are shared."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.memory import process_memory

SIZE = 8 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
MAPPER = """
import mmap, sys
file = open(sys.argv[1], 'rb')
view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(view[::4096])
print('mapped', flush=True)
sys.stdin.read()
"""


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, mmap.mmap]:
    """A file with every page mapped and touched by this process."""
    path = tmp_path / "a model.gguf"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(view[::PAGE])
    return path, view


def test_a_second_process_that_maps_the_file_halves_its_share(mapped: tuple[Path, mmap.mmap]) -> None:
    path, _view = mapped
    alone = process_memory(path)
    assert (alone["mapped_bytes"], alone["rss_bytes"], alone["pss_bytes"]) == (SIZE, SIZE, SIZE)
    other = subprocess.Popen(
        [sys.executable, "-c", MAPPER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    shared = process_memory(path)
    other.communicate()
    assert shared["pss_bytes"] == SIZE // 2
    assert shared["rss_bytes"] == shared["shared_clean_bytes"] + shared["shared_dirty_bytes"] == SIZE


def test_any_name_of_the_file_finds_its_mapping(mapped: tuple[Path, mmap.mmap], tmp_path: Path) -> None:
    path, _view = mapped
    other = tmp_path / "link"
    other.symlink_to(path)
    assert process_memory(other)["rss_bytes"] == SIZE


def test_a_file_that_is_not_mapped_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"x")
    memory = process_memory(path)
    assert memory["pss_bytes"] == memory["mapped_bytes"] == 0
    assert memory["pid"] == os.getpid()


def test_a_private_copy_is_anonymous_and_a_mapping_is_not(mapped: tuple[Path, mmap.mmap]) -> None:
    path, view = mapped
    before = int(process_memory(path)["anonymous_bytes"])
    copy = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy.write(view[:])
    after = int(process_memory(path)["anonymous_bytes"])
    assert abs(after - before - SIZE) < 2 << 20
    copy.close()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        process_memory(tmp_path / "none")
