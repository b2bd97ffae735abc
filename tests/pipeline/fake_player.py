"""A player's process with an engine of a few lines; `options["kv"]` is how it behaves."""

from __future__ import annotations

import os
import signal
import sys
import time

from pipeline.bench import child


class FakeInstrument:
    """Takes a second for each token in its word; says what process it is in."""

    def __init__(self, engine, *, options, **opening):
        self.behaviour = options.get("kv", "good")
        if self.behaviour == "refuses":
            os.write(2, b"fake: first\nfake: no such architecture\n")
            raise RuntimeError("opened no model")
        if self.behaviour == "illegal":
            os.kill(os.getpid(), signal.SIGILL)
        self.info = {
            "engine": engine,
            **opening,
            "cores": sorted(os.sched_getaffinity(0)),
            "omp": os.environ.get("OMP_NUM_THREADS"),
            "pid": os.getpid(),
        }

    def measure(self, workload):
        if self.behaviour == "sleeps":
            time.sleep(60)
        if self.behaviour == "crashes":
            os.write(1, b"out of luck\n")
            os.write(2, b"fake: one\n\nfake: GGML_ASSERT(n > 0) failed\n#0 wait4\n#1 abort\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.behaviour == "exits":
            os._exit(7)
        if self.behaviour == "raises":
            raise MemoryError("4 GB wanted")
        return float(workload.n_tokens)


child._open = FakeInstrument
child.main(sys.argv[1:])
