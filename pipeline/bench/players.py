"""An engine in a process of its own, ours or a peer's: the same threads, cores, token ids and clock for all.

    with Player("llama_cpp", path, threads=2, cores=[0, 1], options={}, max_tokens=512, n_seqs=1) as player:
        player.measure("prompt", n_prompt=512, n_generate=0, n_seqs=1).tok_per_s

Peers are Python packages, extra `bench`: they bring the native library and the layout of its structures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import IncompleteError, SettingsError
from pipeline.memory import process_memory
from pipeline.runtime import worker_env
from pipeline.settings import nearest

OWN: dict[str, dict[str, Any]] = {"pagemill": {}, "pagemill_int8": {"activations": "int8"}}
"""Ourselves, and ourselves with other settings, which may stand beside peers."""
PEERS = ("llama_cpp", "ik_llama_cpp")
ENGINES = (*OWN, *PEERS)

_CHILD = (sys.executable, "-P", "-m", "pipeline.bench.child")
_OPTIONS: dict[str, dict[str, tuple[dict[str, Any], ...]]] = {  # by kind; "" is any other
    "llama_cpp": {
        "perplexity": ({"batch": 2048}, {"batch": 512}, {"batch": 2048, "flash_attention": False}),
        "": ({}, {"flash_attention": False}, {"repack": False}),
    },
    "ik_llama_cpp": {  # one cache for all sequences: windows side by side cost it attention
        "perplexity": ({"batch": 512}, {"batch": 2048}, {"batch": 512, "repack": True}),
        # The wheel's flash attention ends the process (GGML_ASSERT(S > 0)) when it decodes several sequences.
        "batched": ({"flash_attention": False}, {"flash_attention": False, "repack": True}, {}),
        "": ({}, {"flash_attention": False}, {"repack": True}),
    },
}
_FATAL = ("GGML_ASSERT", "Fatal error")  # what ggml says before it aborts; a stack trace comes after
_LAST_LINES = 5
_CLOSING_S = 5.0


class PlayerError(IncompleteError):
    """A player could not open its model, could not do its work, or its process died."""


@dataclass(frozen=True)
class Measurement:
    """One repetition: the tokens counted, and the seconds that they took."""

    n_tokens: int
    seconds: float

    @property
    def tok_per_s(self) -> float:
        """Tokens per second."""
        return self.n_tokens / self.seconds


def check_peers(names: Sequence[str]) -> None:
    """Check that peers are known and installed; nothing is imported.

    Raises:
        SettingsError: for the first that is not.
    """
    for name in names:
        if name not in ENGINES[1:]:
            raise SettingsError(f"peer={name} is not known{nearest(name, ENGINES[1:])}")
        if name in PEERS and importlib.util.find_spec(name) is None:
            raise SettingsError(
                f"peer={name}: there is no Python package {name} here",
                "pip install 'pagemill[bench]'; llama-cpp-python is compiled on the way, for minutes",
            )


def options_of(engine: str, kind: str) -> list[dict[str, Any]]:
    """Settings to try, at most three, of which an engine's fastest counts."""
    if engine in OWN:
        return [dict(OWN[engine])]
    return [dict(options) for options in _OPTIONS[engine].get(kind, _OPTIONS[engine][""])]


class Player:
    """A model open in an engine, in a process that is pinned, and that ends with this one.

    Args:
        engine: one of `ENGINES`.
        threads: for prompts and single tokens alike.
        cores: the CPUs to run on, None for any.
        options: settings of the engine, a few of `pipeline.bench.own.OPTIONS` or
            `pipeline.bench.libllama.OPTIONS`; the others keep their defaults.
        max_tokens, n_seqs: the largest work that will be asked for: positions of all sequences, sequences.

    Attributes:
        info: engine, version, threads, settings in force (`kv`, `batch`, `ubatch`, `flash_attention`, ...),
            `features` of the CPU that it was compiled for, `load_s` (the model), `ready_s` (that and a
            16-token window), `stages`; ours also `open_ms`, `compile_s` (in neither), `scratch_bytes`.

    Raises:
        SettingsError: an unknown engine, one that is not installed, or an option that it does not have.
        EngineError, OSError: the file is no GGUF model or cannot be read.
        PlayerError: the engine did not open the model, or its process died; there is no embedding.
    """

    def __init__(
        self,
        engine: str,
        model_path: str,
        *,
        threads: int,
        cores: Sequence[int] | None,
        options: Mapping[str, Any],
        max_tokens: int,
        n_seqs: int,
    ) -> None:
        self.engine, self._max_tokens, self._n_seqs = engine, max_tokens, n_seqs
        if engine not in OWN:
            check_peers([engine])
        _check_options(engine, options)
        opening = {"model_path": model_path, "threads": threads, "options": dict(options)}
        self._paths, vocabulary = _read_header(model_path)
        self._said = tempfile.TemporaryFile()
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        own = worker_env(threads)
        theirs = own | {"OMP_NUM_THREADS": str(threads), "GGML_NO_BACKTRACE": "1"}
        try:
            self._process = subprocess.Popen(
                [*_CHILD, engine, str(requests), str(answers), ",".join(map(str, cores or ()))],
                env={**os.environ, **(own if engine in OWN else theirs), "PYTHONPATH": _python_path()},
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                pass_fds=(requests, answers),
            )
        except BaseException:
            self._close_pipes()
            raise
        finally:
            os.close(requests)
            os.close(answers)
        self._lines = os.fdopen(self._answers, closefd=False)
        try:
            self.info = self._ask("open", opening | vocabulary, f"while it opened {model_path}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def measure(self, kind: str, *, n_prompt: int, n_generate: int, n_seqs: int) -> Measurement:
        """One repetition of a kind of work (pipeline/bench/calls.py), from empty caches.

        The first one of a shape is preceded by its first call, untimed: caches are made and pages touched.

        Raises:
            ValueError: an unknown kind, sizes that it cannot have, or more than the player was opened for.
            PlayerError: the engine failed, or its process died.
        """
        from pipeline.bench.calls import Workload

        workload = Workload(kind, n_prompt, n_generate, n_seqs)
        if n_seqs > self._n_seqs or n_seqs * workload.length > self._max_tokens:
            raise ValueError(
                f"{n_seqs} sequences of {workload.length} tokens; the player was opened for {self._n_seqs} "
                f"sequences and {self._max_tokens} tokens in all"
            )
        asked = {"kind": kind, "n_prompt": n_prompt, "n_generate": n_generate, "n_seqs": n_seqs}
        return Measurement(**self._ask("measure", asked, f"in {kind} of {n_seqs} x {workload.length} tokens"))

    def memory(self) -> dict[str, Any]:
        """Memory of the player's process and its share of the model's pages; see `pipeline.memory`."""
        return process_memory(*self._paths, pid=self._process.pid)

    def close(self) -> None:
        """End the process, even amid its work; again changes nothing."""
        if self._said.closed:
            return
        self._close_pipes()
        try:
            self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _close_pipes(self) -> None:
        os.close(self._requests)
        os.close(self._answers)
        self._said.close()

    def _ask(self, request: str, asked: Mapping[str, Any], doing: str) -> dict[str, Any]:
        """The answer to a request; what the engine reports as an error, or its death, is raised."""
        try:
            os.write(self._requests, json.dumps({request: asked}).encode() + b"\n")
            line = self._lines.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PlayerError(f"{self.engine} {_ended(self._process.wait())} {doing}{self._last_lines()}")
        answer: dict[str, Any] = json.loads(line)
        error = answer.get("error")
        if error:
            said = self._last_lines() if error["type"] == "RuntimeError" else ""
            raise PlayerError(f"{self.engine} failed {doing}: {error['message']}{said}", kind=error["type"])
        return answer

    def _last_lines(self) -> str:
        """What the process wrote last, as the end of a message."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        fatal = [i for i, line in enumerate(said) if any(word in line for word in _FATAL)]
        last = said[: fatal[-1] + 1 if fatal else None][-_LAST_LINES:]
        return f"; it last wrote: {' | '.join(last)}" if last else ""


def _check_options(engine: str, options: Mapping[str, Any]) -> None:
    from pipeline.bench import libllama, own

    known = list(own.OPTIONS if engine in OWN else libllama.OPTIONS)
    for name in options:
        if name not in known:
            raise SettingsError(f"{engine} has no option {name}{nearest(name, known)}")


def _read_header(model_path: str) -> tuple[tuple[str, ...], dict[str, int | None]]:
    """A model's files, and what token ids are drawn from."""
    import engine

    with engine.open(model_path) as file:
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None:
            raise PlayerError(f"{model_path} has no tensor token_embd.weight; expected a language model")
        n_vocab = embedding.shape[0]
        bos_id = file.metadata.get("tokenizer.ggml.bos_token_id")
        first = bos_id if isinstance(bos_id, int) and 0 <= bos_id < n_vocab else None
        return tuple(file.paths), {"n_vocab": n_vocab, "bos_id": first}


def _python_path() -> str:
    """So that the child imports the modules that this process has, installed or not."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


def _ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
