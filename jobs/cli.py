"""The command `pagemill JOB key=value ...`: from words to an exit code and one JSON line.

Nothing heavy is imported before it is needed: `--help` and completion answer at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from jobs.overrides import quote_paths, split_flags

if TYPE_CHECKING:
    from jobs.failures import Failure

JOBS = {
    "perplexity": "perplexity of a GGUF model over a text, with its errors, or of a grid of them",
    "throughput": "tokens/s of a GGUF model, beside the machine's limits and beside other engines",
    "results": "what all runs so far came to, chosen, sorted, as a table, CSV, Markdown or JSON",
    "convert": "a Hugging Face checkpoint (Mamba, Mamba-2, FalconMamba, LLaMA's family) as a GGUF file",
    "quantize": "a GGUF file in other types, byte for byte as llama-quantize makes it",
    "imatrix": "the importance matrix of a GGUF model on a text, for quantizing it",
    "compare": "variants of a GGUF model against their base: which quantization to ship",
    "regression": "a suite of checks against its baseline: what got worse, and what is to blame",
}

HELP = """\
pagemill JOB key=value ...

{jobs}

pagemill JOB --help          groups, keys and their values as composed
pagemill JOB --cfg job       the resolved config; --info defaults-tree: where each value comes from
eval "$(pagemill -sc install=bash)"      completion of jobs, groups and keys
pagemill --version

pagemill perplexity experiment=demo
pagemill perplexity model.path=FILE.gguf data.path=TEXT.txt protocol.limit=8
pagemill perplexity 'sweep={{model.path:[a.gguf,b.gguf],protocol.window:[512,2048]}}' data=pydoc sort=ppl
pagemill throughput model.path=FILE.gguf peer=[llama_cpp]
pagemill quantize model.path=FILE.gguf quantize.type=Q4_K_M quantize.out=NEW.gguf
pagemill results results.sort=ppl results.format=csv
pagemill regression suite=smoke action=promote

Paths are written as the shell gives them; spaces, commas and = need no quotes of Hydra's.
The last line of standard output is one JSON object, below the text that `results` was asked for; everything
else goes to standard error.
Exit codes: 0 done, 1 beyond a limit, 2 refused before work, 3 incomplete, 4 a bug of ours, 130 interrupted.
PAGEMILL_DEBUG=1 shows tracebacks."""

_TALKING = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version")
"""Flags that ask a question: the answer itself goes to standard output, and no JSON line."""


def main() -> NoReturn:
    """Console script."""
    leave(run(sys.argv[1:]))


def leave(exit_code: int) -> NoReturn:
    """End the process here and now, with this exit code and no other.

    Everything is on disk and closed by now. Ray's native threads were seen to crash while an interpreter
    shuts down (139 instead of 130, after an interrupt during its start); exit codes are a contract.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(exit_code)


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code; standard output is kept clean until the process ends."""
    from jobs.stdout import divert_stdout

    if not words or words[0].startswith("-"):
        return _top_level(words)
    if words[0] in JOBS and any(word.partition("=")[0] in _TALKING for word in words):
        return _talk(words[0], words[1:])
    exit_code = execute(words[0], words[1:])
    divert_stdout()  # Ray's and MLflow's exit handlers are still to come
    return exit_code


def execute(job: str, words: Sequence[str]) -> int:
    """Run a job, write its JSON line, and leave standard output as it was found."""
    from jobs import outcome
    from jobs.stdout import StdoutGuard, to_json
    from pipeline.redact import redacted

    outcome.CURRENT = outcome.Outcome()
    with StdoutGuard() as stdout:
        failure = _attempt(job, words)
        line = redacted(outcome.CURRENT.line(job, failure))
        if line["error"]:
            _tell(line["error"]["message"], line["error"]["hint"])
        stdout.write(outcome.CURRENT.text)
        stdout.write(to_json(line) + "\n")
    return int(line["exit_code"])


def _attempt(job: str, words: Sequence[str]) -> Failure | None:
    from jobs import failures, outcome, schema
    from pipeline.runtime import setup_logging

    setup_logging()
    if job not in JOBS:
        hint = f"did you mean {schema.nearest(job, list(JOBS))}? (known: {', '.join(JOBS)})"
        return failures.Failure(failures.REFUSED, "UnknownJob", f"there is no job {job!r}", hint)
    try:
        with _interruptible(), _hydra_that_raises():
            _call_hydra(job, words)
    except KeyboardInterrupt:
        return failures.from_interrupt()
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:  # the handler that ray.init puts in place of ours
            return failures.from_interrupt()
        flags = " ".join(word for word in words if word.startswith("-"))
        message = f"{flags}: not a flag of this command, or a flag without its value"
        return failures.Failure(failures.REFUSED, "UsageError", message, f"see `pagemill {job} --help`")
    except outcome.Stopped as stopped:
        return _explained(stopped.error, job, words)
    except Exception as error:
        return _explained(error, job, words)
    return None


def _explained(error: Exception, job: str, words: Sequence[str]) -> Failure:
    from jobs import failures, outcome

    if os.environ.get("PAGEMILL_DEBUG") == "1":
        traceback.print_exception(error)
    return failures.from_exception(error, _module(job).SCHEMA, words, outcome.CURRENT.results)


def _talk(job: str, words: Sequence[str]) -> int:
    """Answer a question (`--help`, `--cfg`, `--info`) on standard output."""
    from jobs import failures, usage

    if "--help" in words or "-h" in words:
        _say(usage.text(job))
        return failures.DONE
    try:
        with _hydra_that_raises():
            _call_hydra(job, words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        return failures.DONE
    except Exception as error:
        failure = _explained(error, job, words)
        _tell(failure.message, failure.hint)
        return failure.exit_code
    return failures.DONE


def _top_level(words: Sequence[str]) -> int:
    word = words[0] if words else ""
    if word in ("-h", "--help"):
        width = max(map(len, JOBS))
        _say(HELP.format(jobs="\n".join(f"  {name:<{width}}  {what}" for name, what in JOBS.items())))
        return 0
    if word == "--version":
        from importlib.metadata import version

        _say(f"pagemill {version('pagemill')}")
        return 0
    if word in ("-sc", "--shell-completion"):
        from jobs import completion

        answers = {
            "install=bash": lambda: [completion.BASH],
            "uninstall=bash": lambda: [completion.BASH_AWAY],
            "query=bash": lambda: completion.query(JOBS, lambda job: _module(job).main),
        }
        if len(words) == 2 and words[1] in answers:
            for line in answers[words[1]]():
                _say(line)
            return 0
    return execute(word, words[1:])


def _module(job: str) -> Any:
    return import_module(f"jobs.{job}")


def _call_hydra(job: str, words: Sequence[str]) -> None:
    """Run a job's `@hydra.main` function on `words`; Hydra reads them from sys.argv."""
    main_of_job: Callable[[], None] = _module(job).main
    argv = sys.argv
    overrides, flags = split_flags(quote_paths(words))
    sys.argv = [f"pagemill {job}", *overrides, *flags]
    try:
        main_of_job()
    finally:
        sys.argv = argv


@contextlib.contextmanager
def _hydra_that_raises() -> Iterator[None]:
    """With this variable Hydra raises its errors; without it, it prints them and exits with 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _tell(message: str, hint: str | None) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"pagemill: {message}\n" + (f"  hint: {hint}\n" if hint else ""))
        sys.stderr.flush()
