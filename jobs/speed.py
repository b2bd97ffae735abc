"""The README's section on speed and its figure, measured and written by one command.

    python -m jobs.speed MODEL.gguf [--folder FOLDER] [--types Q4_1,Q8_0] [--reuse] [KEY=VALUE ...]

Runs `pagemill throughput` on the model in every weight type, beside both peers, then `jobs.bench_kernels`,
and writes `notebooks/roofline.svg` and the section between the README's two comments. Files of other types
are made in FOLDER by llama.cpp's quantizer, once. With `--reuse` nothing is measured that is there: rows of
`table=throughput` and the last JSON of the bench. Words with `=` go to the throughput job. Five minutes for
each type with two peers on two cores; needs the extras `bench` and `report`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bench import roofline, section
from pipeline.bench.players import PEERS
from pipeline.bench.requantize import requantized
from pipeline.errors import IncompleteError, PipelineError
from pipeline.runtime import setup_logging

TYPES = ("Q4_1", "Q4_K_M", "Q6_K", "Q8_0", "Q4_0", "Q2_K", "F16", "F32")
TESTS = (
    *("bench.kinds=[perplexity,generate,batched]", "bench.windows=4"),
    *("bench.prompt=[64]", "bench.generate=[32]", "bench.seqs=[8]"),
)
"""Shorter than the job's defaults: eight types of three engines."""
ROOT = Path(__file__).resolve().parent.parent
log = logging.getLogger("jobs.speed")


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = _parsed(sys.argv[1:] if words is None else words)
    setup_logging()
    try:
        _run(given)
    except PipelineError as error:
        log.error("%s%s", error, f"; {error.hint}" if error.hint else "")
        return error.exit_code
    return 0


def _run(given: argparse.Namespace) -> None:
    readme, figure = given.readme.resolve(), given.figure.resolve()
    section.replaced(readme.read_text(encoding="utf-8"), "", str(readme))  # refused now, not in an hour
    models = [str(path.resolve()) for path in requantized(given.model, given.folder, given.types)]
    results, bench_file = given.results.resolve(), given.results.resolve() / "reports" / "bench_kernels.json"
    for model in models:
        if not (given.reuse and section.latest(results, [model])):
            _throughput(model, results, given)
    if not (given.reuse and bench_file.exists()):
        _call(_python("jobs.bench_kernels", str(given.model), "--json", str(bench_file), *_threads(given)))
    bench: dict[str, Any] = json.loads(bench_file.read_text(encoding="utf-8"))
    roofline.draw(bench, figure)
    link = os.path.relpath(figure, readme.parent)
    text = section.section(section.latest(results, models), bench, link, _command(given))
    readme.write_text(
        section.replaced(readme.read_text(encoding="utf-8"), text, str(readme)), encoding="utf-8"
    )
    log.info("%s and %s are written", figure, readme)


def _throughput(model: str, results: Path, given: argparse.Namespace) -> None:
    overrides = [f"model.path={model}", f"paths.results={results}", f"engine.threads={given.threads}"]
    peers = f"peer=[{','.join(given.peer)}]"
    _call(_python("jobs.throughput", *overrides, peers, "tracking=none", *TESTS, *given.overrides), {0, 3})


def _command(given: argparse.Namespace) -> str:
    """What makes the section again, without the places of one machine."""
    more = [f"SPEED_OPTIONS={shlex.quote(' '.join(given.overrides))}"] if given.overrides else []
    return " ".join(["make speed SPEED_MODELS=FOLDER", *more])


def _python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def _threads(given: argparse.Namespace) -> list[str]:
    return ["--threads", str(given.threads)]


def _call(command: Sequence[str], fine: set[int] | None = None) -> None:
    """Runs a command of ours, its standard error shown.

    Raises:
        IncompleteError: it ended with an exit code that is not among `fine` (0).
    """
    log.info("%s", shlex.join(command[1:]))
    done = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=ROOT, check=False)
    if done.returncode not in (fine or {0}):
        raise IncompleteError(f"{shlex.join(command[1:])}: exit code {done.returncode}; see above")


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file, which the other types are made of")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for the throughput job")
    parser.add_argument("--folder", type=Path, default=Path("models/speed"), help="files of other types")
    parser.add_argument("--types", type=lambda text: text.split(","), default=list(TYPES))
    parser.add_argument("--peer", nargs="*", default=list(PEERS), metavar="ENGINE")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--reuse", action="store_true", help="measure only what is not there")
    parser.add_argument("--figure", type=Path, default=ROOT / "notebooks" / "roofline.svg")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_intermixed_args(words)
    if not given.model.is_file():
        parser.error(f"no model file at {given.model}; `make model` lays one down")
    for word in given.overrides:
        if "=" not in word:
            parser.error(f"{word}: expected KEY=VALUE, as in bench.repeats=3")
    return given


if __name__ == "__main__":
    sys.exit(main())
