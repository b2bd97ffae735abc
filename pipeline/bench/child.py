"""The process in which an engine plays: requests and answers as JSON lines, one for the other.

    python -m pipeline.bench.child ENGINE REQUESTS ANSWERS CORES

REQUESTS and ANSWERS are file descriptors that the parent has opened, CORES the CPUs to run on (`0,1`; empty:
any). Standard output and standard error are left to the native libraries, which write to both.

    {"open": {"model_path", "threads", "options", "n_vocab", "bos_id"}}        what the engine tells of itself
    {"measure": {"kind", "n_prompt", "n_generate", "n_seqs"}}                  {"n_tokens", "seconds"}
    whatever fails                                                            {"error": {"type", "message"}}

The process ends when the parent closes REQUESTS or is no more, whatever it is doing then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from queue import SimpleQueue
from typing import Any, Protocol

from pipeline.bench.calls import Vocabulary, Workload


class Instrument(Protocol):
    """An engine with a model open: `pipeline.bench.own.Own`, `pipeline.bench.libllama.LibLlama`."""

    info: dict[str, Any]

    def measure(self, workload: Workload) -> float:
        """Seconds of one repetition, warmed up before."""


def main(arguments: list[str]) -> None:
    """Answer requests until there are no more."""
    engine, requests, answers, cores = arguments
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which closes REQUESTS
    queue: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(int(requests), queue), daemon=True).start()
    instrument: Instrument | None = None
    with os.fdopen(int(answers), "w") as out:
        while True:
            request = json.loads(queue.get())
            try:
                if instrument is None:
                    instrument = _open(engine, **request["open"])
                    answer = instrument.info
                else:
                    workload = Workload(**request["measure"])
                    answer = {"n_tokens": workload.n_tokens, "seconds": instrument.measure(workload)}
            except Exception as error:
                answer = {"error": {"type": type(error).__name__, "message": str(error)}}
            out.write(json.dumps(answer) + "\n")
            out.flush()


def _open(
    engine: str,
    *,
    model_path: str,
    threads: int,
    options: dict[str, Any],
    n_vocab: int,
    bos_id: int | None,
) -> Instrument:
    vocabulary = Vocabulary(n_vocab, bos_id)
    if engine.startswith("pagemill"):
        from pipeline.bench.own import Own

        return Own(engine, model_path, threads, options, vocabulary)
    from pipeline.bench.libllama import LibLlama

    return LibLlama(engine, model_path, threads, options, vocabulary)


def _listen(requests: int, queue: SimpleQueue[str]) -> None:
    """Hands requests on; a thread of its own, so that the end of the parent is seen during a decode too."""
    with os.fdopen(requests) as lines:
        for line in lines:
            queue.put(line)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
