"""Broken and hostile GGUF files raise GGUFFormatError and nothing else, within 1 s and 64 MB.

The files are opened in a child process (gguf_child.py), which may crash without taking the tests along. The
second is one of CPU time, since the machine may be busy.
PAGEMILL_FUZZ changes the number of random cases.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_gguf import ARRAY, STRING, VALUE_TYPES, Built, Field, Typed, build_gguf, tiny_llama

N_CASES = int(os.environ.get("PAGEMILL_FUZZ", "500"))
N_CASES_SLOW = int(os.environ.get("PAGEMILL_FUZZ", "20000"))
LIMIT_S, LIMIT_BYTES = 1.0, 64 << 20
Case = dict[str, Any]
log = logging.getLogger(__name__)


def rich_file() -> Built:
    """A small file with a field of every kind."""
    metadata: dict[str, Any] = {"general.architecture": "llama", "general.alignment": 64}
    metadata |= {f"one.{name}": Typed(name, 1) for name in VALUE_TYPES}
    metadata |= {f"many.{name}": Typed(name, [1, 0, 1]) for name in VALUE_TYPES}
    metadata |= {"strings": ["", "a", "two words", "日本"]}
    metadata |= {"nested": [[1, 2], [3]], "deep": [[["x"], ["y", "z"]]]}
    raw = np.random.default_rng(0).integers(0, 256, 400, np.uint8).tobytes()
    tensors = {
        "f32": ("F32", (5,), raw[:20]),
        "f16": ("F16", (2, 3, 1, 4), raw[:48]),
        "q4_1": ("Q4_1", (2, 64), raw[:80]),
        "q6_k": ("Q6_K", (1, 256), raw[:210]),
    }
    return build_gguf(metadata, tensors)


class Child:
    """The process that opens files, and the worst it has answered."""

    def __init__(self, folder: Path, bases: list[Path]) -> None:
        script = Path(__file__).with_name("gguf_child.py")
        self.process = subprocess.Popen(
            [sys.executable, script, folder, *bases], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.n_cases, self.cpu_s, self.peak_bytes = 0, 0.0, 0

    def open(self, case: Case) -> str:
        """Opens a case; fails the test unless it was opened or refused within the limits."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the process died ({self.process.wait()}) of {case}"
        answer = json.loads(line)
        assert answer["outcome"] in ("opened", "refused"), (case, answer)
        assert answer["cpu_s"] < LIMIT_S, (case, answer)
        assert answer["peak_bytes"] < LIMIT_BYTES, (case, answer)
        self.n_cases += 1
        self.cpu_s = max(self.cpu_s, answer["cpu_s"])
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return str(answer["outcome"])

    def close(self) -> None:
        """Ends the process; logs the worst it has seen."""
        with self.process:  # closes its standard input
            pass
        worst = f"{self.cpu_s * 1e3:.1f} ms and {self.peak_bytes / 2**20:.2f} MB"
        log.info("%d files opened or refused, the worst in %s", self.n_cases, worst)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bases")
    (folder / "rich.gguf").write_bytes(RICH.data)
    return [folder / "rich.gguf", tiny_llama(folder / "tiny.gguf", n_layers=1, vocab=280, ff=32)]


@pytest.fixture(scope="module")
def child(bases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    process = Child(tmp_path_factory.mktemp("cases"), bases)
    yield process
    process.close()


RICH = rich_file()


def interesting(field: Field, data: bytes | bytearray) -> list[int]:
    """What a number may maliciously be: 0, 1, the most, its neighbours, all that is left and one more."""
    old = int.from_bytes(data[field.offset : field.offset + field.size], "little")
    left = len(data) - field.offset - field.size
    most = (1 << 8 * field.size) - 1
    values = {
        0,
        1,
        2,
        3,
        5,
        33,
        most,
        most - 1,
        most // 2,
        most // 2 + 1,
        old + 1,
        old - 1,
        2 * old,
        old ^ 64,
    }
    values |= {
        left,
        left + 1,
        left // 8,
        left // 8 + 1,
        left // 12 + 1,
        len(data),
        len(data) - RICH.data_offset,
    }
    if field.kind == "type":
        values |= set(range(14)) | {30, 31, 41, 42}
    if field.kind == "offset":
        values |= set(range(0, len(data) - RICH.data_offset + 65, 64))
    return sorted(value for value in values if 0 <= value <= most and value != old)


def edit(field: Field, value: int) -> list[Any]:
    return [field.offset, value.to_bytes(field.size, "little").hex()]


NUMBERS = [field for field in RICH.fields if field.kind not in ("text", "items")]


def test_every_number_set_to_extremes_is_opened_or_refused(child: Child) -> None:
    outcomes = [
        child.open({"base": 0, "edits": [edit(field, value)], "cut": None})
        for field in NUMBERS
        for value in interesting(field, RICH.data)
    ]
    assert len(outcomes) > 1000
    assert outcomes.count("refused") > len(outcomes) / 2


def test_every_truncation_at_a_border_is_refused(child: Child) -> None:
    n_bytes = RICH.data_offset + max(64 * 3 + 64, 0) + 210
    sizes = {border + step for border in RICH.borders() for step in (-1, 0, 1)}
    for size in sorted(size for size in sizes if 0 <= size < n_bytes):
        assert child.open({"base": 0, "edits": [], "cut": size}) == "refused", size


def test_pairs_of_swapped_numbers_are_opened_or_refused(child: Child) -> None:
    wide = [field for field in NUMBERS if field.size == 8]
    for one, other in pairwise(wide):
        raw = [RICH.data[field.offset : field.offset + 8].hex() for field in (one, other)]
        child.open({"base": 0, "edits": [[one.offset, raw[1]], [other.offset, raw[0]]], "cut": None})


def cases() -> st.SearchStrategy[Case]:
    """One to three changed numbers, flipped bytes or pasted pieces, in either file, sometimes cut."""
    sizes = {0: len(RICH.data), 1: 60_000}
    number = st.sampled_from(NUMBERS).flatmap(
        lambda field: st.sampled_from(interesting(field, RICH.data)).map(lambda value: edit(field, value))
    )

    def flip(base: int) -> st.SearchStrategy[list[Any]]:
        place = st.integers(0, sizes[base] - 1)
        if base == 1:  # its header, where all depends on all
            place = st.integers(0, 9_000)
        return st.tuples(place, st.binary(min_size=1, max_size=9).map(bytes.hex)).map(list)

    def case(base: int) -> st.SearchStrategy[Case]:
        edits = st.lists(number | flip(base) if base == 0 else flip(base), min_size=1, max_size=3)
        cut = st.none() | st.integers(0, sizes[base])
        return st.fixed_dictionaries({"base": st.just(base), "edits": edits, "cut": cut})

    return st.sampled_from([0, 0, 0, 1]).flatmap(case)


def fuzz(child: Child, n_cases: int) -> None:
    begun = child.n_cases

    @settings(
        max_examples=n_cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        child.open(case)

    run()
    assert child.n_cases - begun >= n_cases


def test_mutated_files_are_opened_or_refused(child: Child) -> None:
    fuzz(child, N_CASES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_mutated_files_are_opened_or_refused(child: Child) -> None:
    fuzz(child, N_CASES_SLOW)


def one_key(type_id: int, *rest: bytes) -> bytes:
    """A header of one key up to the value's items."""
    built = Built(bytearray(b"GGUF"))
    for kind, value in (("u32", 3), ("u64", 0), ("u64", 1)):
        built.put("", "", kind, value)
    built.put_text("", "k")
    built.put("", "", "u32", type_id)
    return bytes(built.data) + b"".join(rest)


def array_head(type_id: int, count: int) -> bytes:
    return type_id.to_bytes(4, "little") + count.to_bytes(8, "little")


GIB = 1 << 30
HUGE = {  # zeros follow, which are empty strings, empty arrays, zeros
    "strings": (one_key(ARRAY, array_head(STRING, GIB // 8)), "more than 32 MiB"),
    "as many strings as are indexed": (one_key(ARRAY, array_head(STRING, 4_000_000)), None),
    "nested arrays": (one_key(ARRAY, array_head(ARRAY, GIB // 12 - 100)), "more than 32 MiB"),
    "bools": (one_key(ARRAY, array_head(7, GIB)), "more than 32 MiB"),
    "numbers, of which none is read": (one_key(ARRAY, array_head(12, GIB // 8)), None),
    "a string": (one_key(STRING, GIB.to_bytes(8, "little")), "more than 32 MiB"),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_arrays_cost_no_more_than_small_ones(child: Child, tmp_path: Path, name: str) -> None:
    head, message = HUGE[name]
    path = tmp_path / "huge.gguf"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(GIB + len(head))  # sparse
    assert child.open({"path": str(path)}) == ("refused" if message else "opened")


@pytest.mark.parametrize("what", ["keys", "tensors"])
def test_endless_tables_are_refused(child: Child, tmp_path: Path, what: str) -> None:
    items: Any = ((f"{i:x}", Typed("u8", 0) if what == "keys" else ("I8", (1,), b"")) for i in range(100_000))
    built = build_gguf(items, {}) if what == "keys" else build_gguf({}, items)
    (tmp_path / "f.gguf").write_bytes(built.data)
    assert child.open({"path": str(tmp_path / "f.gguf")}) == "refused"
