"""The process in which test_gguf_fuzz.py opens broken files: `python gguf_child.py FOLDER BASE...`.

Reads a case a line from standard input, {"base": 0, "edits": [[offset, "hex"], ...], "cut": null or size} or
{"path": "file"}, and answers a line: {"outcome", "message", "cpu_s", "peak_bytes"}. The outcome is "opened",
"refused" (GGUFFormatError) or the name of any other exception. Each case is opened by the kernel and by the
plain walk over strings, which must agree; once against the clock and, small files, once with every allocation
traced, which is slow. No open may take more than 64 MB of address space besides the mapping.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

import engine
from engine import gguf_fields
from engine.gguf import StringArray
from engine.kernels import strings  # noqa: F401  (Numba is loaded: `locate_strings` takes the kernel)

LIMIT_BYTES = 64 << 20
TRACED_BYTES = 1 << 20  # larger files are bound by the limit alone
WALKS = {"kernel": gguf_fields.locate_strings, "plain": gguf_fields.locate_strings_plainly}


def main() -> None:
    """Serves cases until standard input ends."""
    folder, *bases = (Path(argument) for argument in sys.argv[1:])
    contents = [base.read_bytes() for base in bases]
    for base in bases:
        engine.open(base).close()  # compiles the kernel, which takes more than the limit
    for line in sys.stdin:
        case = json.loads(line)
        path = Path(case["path"]) if "path" in case else write_case(folder / "case.gguf", contents, case)
        sys.stdout.write(json.dumps(judge(path)) + "\n")
        sys.stdout.flush()


def write_case(path: Path, contents: list[bytes], case: dict[str, Any]) -> Path:
    """The base file with its edits, cut."""
    data = bytearray(contents[case["base"]])
    for offset, replacement in case["edits"]:
        raw = bytes.fromhex(replacement)
        data[offset : offset + len(raw)] = raw
    path.unlink(missing_ok=True)  # never shorten a file that is mapped
    path.write_bytes(data[: case["cut"]])
    return path


def judge(path: Path) -> dict[str, Any]:
    """Opens the file by both walks; the worse of each figure."""
    answers = []
    for walk in WALKS.values():
        gguf_fields.locate_strings = walk
        outcome, message, cpu_s = open_once(path)
        peak = traced_peak(path) if path.stat().st_size < TRACED_BYTES else 0
        answers.append({"outcome": outcome, "message": message, "cpu_s": cpu_s, "peak_bytes": peak})
    worst = {key: max(answer[key] for answer in answers) for key in ("cpu_s", "peak_bytes")}
    if len({(answer["outcome"], answer["message"]) for answer in answers}) > 1:
        return worst | {"outcome": "the walks disagree", "message": str(answers)}
    return answers[0] | worst


def traced_peak(path: Path) -> int:
    """Bytes that opening the file allocates at most."""
    tracemalloc.start()
    open_once(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def open_once(path: Path) -> tuple[str, str, float]:
    """Opens the file under the limit, then reads what it offers: outcome, message, CPU seconds of opening."""
    outcome, message, file = "opened", "", None
    limit_address_space(LIMIT_BYTES + path.stat().st_size)
    begun = time.process_time()
    try:
        file = engine.open(path)
    except engine.GGUFFormatError as error:
        outcome, message = "refused", str(error)
    except Exception as error:
        outcome, message = type(error).__name__, str(error)
    cpu_s = time.process_time() - begun
    limit_address_space(None)
    if file is not None and not tracemalloc.is_tracing():
        outcome = read_all(file)
        file.close()
    return outcome, message, cpu_s


def read_all(file: engine.GGUFFile) -> str:
    """Reads every value (of huge ones the start), both ends of every tensor; "opened" if all is in place."""
    for tensor in file.tensors.values():
        if not file.data_offset <= tensor.offset <= tensor.offset + tensor.n_bytes <= file.n_bytes:
            return f"tensor {tensor.name} lies outside"
        if tensor.data.nbytes != tensor.n_bytes or int(tensor.data[0]) + int(tensor.data[-1]) < 0:
            return f"tensor {tensor.name} has a wrong view"
    values: list[Any] = list(file.metadata.values())
    while values:
        value = values.pop()
        if isinstance(value, tuple):
            values.extend(value)
        elif isinstance(value, np.ndarray):
            value[:1000].copy()
        elif isinstance(value, StringArray):
            try:
                _ = value[:1000], value[-1:]
            except engine.GGUFFormatError:  # not UTF-8, found on access
                assert sum(len(value.raw(i)) for i in range(len(value))[:1000]) <= file.n_bytes
    return "opened"


def limit_address_space(more_bytes: int | None) -> None:
    """Lets the process grow by so much, or (None) without a limit."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if more_bytes is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, hard))
    else:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


if __name__ == "__main__":
    main()
