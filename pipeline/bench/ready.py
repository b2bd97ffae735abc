"""From `EvalWorker(...)` to the first likelihoods: seconds by stage, in a fresh process, imports done.

    python -m pipeline.bench.ready MODEL.gguf        one JSON line

    imports    interpreter, libraries, the engine's modules; before the clock starts
    digest     the model's SHA-256, from the cache; for that its files are opened a first time, and the first
               kernel of the process has Numba load all it knows of NumPy, which is most of this stage
    open       the file's header, again
    kernels    from disk, and two tokens through all layers
    model      activations and scratch
    stream     the token stream and the key/value cache
    score      16 tokens, from their ids to the likelihoods of the second half

`ready_s` is the sum of all but the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import PipelineError
from pipeline.preflight import Preflight
from pipeline.runtime import worker_env
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.shards import Shard
from pipeline.worker import EvalWorker, WorkerSpec

WINDOW = 16
STAGES = ("imports", "digest", "open", "kernels", "model", "stream", "score")
_TEXT = "one two three four five six seven eight nine ten " * WINDOW


def ready(model_path: str, cache: str, engine: EngineSettings, repeats: int = 3) -> dict[str, Any]:
    """Medians over fresh processes, after one that is not counted: it may compile.

    Args:
        cache: `paths.cache`, where the model's digest is kept.

    Returns:
        `ready_s`, `open_ms`, `compile_s` of the first process, `stages` in seconds.

    Raises:
        RefusedError: the model cannot be scored.
        PipelineError: a process ended without an answer.
    """
    with TemporaryDirectory() as folder, Preflight() as preflight:
        text = Path(folder, "text.txt")
        text.write_text(_TEXT)
        settings = PerplexitySettings(
            model=ModelSettings(model_path),
            data=DataSettings(path=str(text)),
            protocol=ProtocolSettings(window=WINDOW, limit=1),
            engine=engine,
            cluster=ClusterSettings("inline", workers=1),
            tracking=TrackingSettings("none"),
            paths=PathsSettings(str(Path(folder, "results")), cache),
        )
        spec = preflight.begin(preflight.check(settings)).spec
        answers = [_in_child(spec) for _ in range(repeats + 1)]
    stages = {stage: statistics.median(answer[stage] for answer in answers[1:]) for stage in STAGES}
    return {
        "ready_s": statistics.median(answer["ready_s"] for answer in answers[1:]),
        "open_ms": stages["open"] * 1e3,
        "compile_s": answers[0]["compile_s"],
        "stages": stages,
    }


def _in_child(spec: WorkerSpec) -> dict[str, float]:
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **worker_env(spec.engine.threads), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pipeline.bench.ready", "--child"]
    began_s = time.time()
    done = subprocess.run(
        command, input=pickle.dumps(spec), env=environment, capture_output=True, check=False
    )
    try:
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        message = f"{spec.model_path}: no first likelihoods from a fresh process: {said[-1]}"
        raise PipelineError(message) from None
    return answer | {"imports": answer["imported_at"] - began_s}


def _child() -> dict[str, float]:
    """The fresh process: imports, then the clock."""
    import engine.models

    for found in iter_modules(engine.models.__path__):
        import_module(f"engine.models.{found.name}")
    for module in ("pipeline.metrics", "pipeline.provenance", "pipeline.store", "pipeline.tokens"):
        import_module(module)
    imported_at = time.time()
    return {"imported_at": imported_at, **_timed(pickle.load(sys.stdin.buffer))}


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.child and given.model is None:
        parser.error("name a GGUF file")
    threads = EngineSettings(threads=given.threads)
    found = _child() if given.child else ready(given.model, PathsSettings().cache, threads)
    sys.stdout.write(json.dumps(found) + "\n")


def _timed(spec: WorkerSpec) -> dict[str, float]:
    """Seconds of each stage of a worker's start and of its first window."""
    import engine
    from pipeline import provenance

    seconds: dict[str, float] = {}

    def watched(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                seconds[stage] = time.perf_counter() - began

        return timed

    # a worker looks its calls up when it makes them, so each can be timed without a clock in the worker
    for stage, owner, name in (
        ("digest", provenance, "model_sha256"),
        ("open", engine, "open"),
        ("kernels", engine, "warm_up"),
        ("model", engine, "load_model"),
    ):
        setattr(owner, name, watched(stage, getattr(owner, name)))
    began = time.perf_counter()
    worker = EvalWorker(spec)
    made = time.perf_counter()
    worker.scorer.decode = watched("nll", worker.scorer.decode)
    worker.run(Shard(0, 1))
    stream = made - began - sum(seconds[stage] for stage in ("digest", "open", "kernels", "model"))
    score = seconds.pop("nll")
    worker.close()
    known = {**seconds, "stream": stream, "score": score}
    return {**known, "ready_s": sum(known.values()), "compile_s": worker.compile_s}


if __name__ == "__main__":
    _main()
