"""Our engine as a player: the calls that the peers get, as batches on a cache.

A perplexity takes `Model.nll` and a fleeting cache, as the evaluation does; prompts and single tokens take
`Model.logits` and a cache that keeps every layer. What is timed is what a user of the engine pays for a call,
the building of its batch included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pipeline.bench.calls import READY_TOKENS, Call, Group, Vocabulary, Workload

OPTIONS: dict[str, Any] = {"batch_tokens": 4096, "kv": "f32", "activations": "f32", "load": "mmap"}
"""What can be set, with the evaluation's defaults."""


class Own:
    """A model open in the engine.

    Args:
        options: keys of `OPTIONS`; what is left out has its value there.

    Raises:
        EngineError: the model cannot be opened or is not supported.
    """

    def __init__(
        self, engine: str, model_path: str, threads: int, options: Mapping[str, Any], vocabulary: Vocabulary
    ) -> None:
        import engine as pagemill
        from pipeline import provenance
        from pipeline.bench.limits import vector_features

        self._options = OPTIONS | dict(options)
        self._vocabulary, self._batch = vocabulary, pagemill.Batch
        activations = self._options["activations"]
        features = " ".join(vector_features())
        times = [time.perf_counter()]
        self._file = pagemill.open(model_path, load=self._options["load"])
        times.append(time.perf_counter())
        compile_s = float(pagemill.warm_up(self._file, activations))
        times.append(time.perf_counter())
        self._model = pagemill.load_model(
            self._file,
            threads=threads,
            batch_tokens=self._options["batch_tokens"],
            activations=activations,
        )
        times.append(time.perf_counter())
        self._shape: tuple[int, int, bool] | None = None
        self._cache: Any = None
        self._run(Workload("perplexity", READY_TOKENS, 0, 1), warm=False)
        times.append(time.perf_counter())
        spent = [after - before for before, after in pairwise(times)]
        stages = dict(zip(("open_s", "kernels_s", "model_s", "first_window_s"), spent, strict=True))
        self.info: dict[str, Any] = {
            "engine": engine,
            "version": provenance.version(),
            "numerics": pagemill.NUMERICS,
            "threads": threads,
            "batch": self._options["batch_tokens"],
            "activations": "f32",
            **{key: value for key, value in self._options.items() if key != "batch_tokens"},
            "features": features,
            "scratch_bytes": self._model.nbytes,
            "open_ms": stages["open_s"] * 1e3,
            "compile_s": compile_s,
            "load_s": stages["open_s"] + stages["model_s"],
            "ready_s": sum(spent) - compile_s,
            "stages": stages,
        }

    def measure(self, workload: Workload) -> float:
        """Seconds of the timed calls of one repetition; each group of calls begins with an empty cache."""
        return self._run(workload, warm=True)

    def _run(self, workload: Workload, *, warm: bool) -> float:
        seconds = 0.0
        for group in workload.groups(self._vocabulary, self._options["batch_tokens"]):
            if self._make_cache(group, workload) and warm:
                self._decode(group.calls[0])
            self._cache.clear()
            for call in group.calls:
                started = time.perf_counter()
                self._decode(call)
                if call.timed:
                    seconds += time.perf_counter() - started
        return seconds

    def _decode(self, call: Call) -> None:
        if (call.targets >= 0).any():
            batch = self._batch(call.tokens, call.positions, call.slots, targets=call.targets)
            self._model.nll(batch, self._cache)
        else:
            batch = self._batch(call.tokens, call.positions, call.slots, outputs=call.outputs)
            self._model.logits(batch, self._cache)

    def _make_cache(self, group: Group, workload: Workload) -> bool:
        """A cache of exactly the group's sequences; whether it is a new one."""
        fleeting = workload.kind == "perplexity" and len(group.calls) == 1
        shape = group.n_slots, group.capacity, fleeting
        if shape == self._shape:
            return False
        self._shape = self._cache = None  # before the next one is made: one cache's memory at a time
        self._cache = self._model.new_cache(*shape[:2], self._options["kv"], fleeting=fleeting)
        self._shape = shape
        return True
