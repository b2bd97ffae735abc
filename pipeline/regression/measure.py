"""A check run by its job, and what was measured of it.

The job is given a folder of the invocation's own as `paths.results`; what it leaves there is read back: rows
by window, the plan with measure and subject, a benchmark's rows. Beside it stand checksums by which a change
is narrowed down: of the layers' outputs for a few windows, and of the tensors in the model file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.bench.settings import ThroughputSettings
from pipeline.compare.settings import CompareSettings
from pipeline.errors import IncompleteError, SettingsError
from pipeline.preflight import Asked, Preflight
from pipeline.regression.limits import PRODUCED
from pipeline.regression.outcome import Measured, WindowSums
from pipeline.regression.suite import Check
from pipeline.runtime import available_cores
from pipeline.settings import ModelSettings, PerplexitySettings

if TYPE_CHECKING:
    import engine
    from pipeline import RunResult
    from pipeline.bench.preflight import Bench, Entrant
    from pipeline.bench.work import Case
    from pipeline.progress import Progress
    from pipeline.windows import Window

_ALSO_KEPT = ("n_windows", "n_scored", "tok_per_s")
_WINDOWS = ("window", "document", "first_token", "n_scored")


class Ahead(NamedTuple):
    """What is known of a measurement before it is made: `Measured.id`, and what will be asked."""

    id: tuple[str, str, str]
    measure: Mapping[str, Any]


class Measurer(Protocol):
    """How checks are made; tests have one of their own."""

    def look(self, check: Check, folder: Path) -> list[Ahead]:
        """Check everything that can be refused; nothing is measured.

        Raises:
            RefusedError: as the check's job.
        """
        ...

    def measure(self, check: Check, folder: Path, progress: Progress | None) -> list[Measured]:
        """Run the check, or what an invocation that died left of it; `folder` is its `paths.results`.

        Raises:
            IncompleteError: shards were set aside, or tests failed.
        """
        ...


class Jobs:
    """The measurer: `pipeline.evaluate`, `pipeline.compare.compare` and `pipeline.bench.throughput.run`."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, str]] = {}  # by the model's SHA-256

    def look(self, check: Check, folder: Path) -> list[Ahead]:
        """See `Measurer`."""
        s = check.at(folder)
        if isinstance(s, ThroughputSettings):
            return self._look_at_speed(check, s)
        with ExitStack() as files, Preflight() as preflight:
            if isinstance(s, PerplexitySettings):
                ready = preflight.check(s)
                names, measure = [model_name(s.model.path)], ready.measure
            else:
                from pipeline.compare import plan

                found = plan.check(s, preflight, files)
                pairs = plan.planned(found).pairs
                names = [pair.variant.name for pair in pairs] + [name for name, _ in found.missing]
                measure = found.asked.measure
        return [Ahead((check.name, name, s.data.name), measure) for name in names]

    def measure(self, check: Check, folder: Path, progress: Progress | None) -> list[Measured]:
        """See `Measurer`."""
        s = check.at(folder)
        if isinstance(s, ThroughputSettings):
            return self._speeds(check, s)
        if isinstance(s, CompareSettings):
            return self._variants(check, s, progress)
        return [self._perplexity(check, s, progress)]

    def _look_at_speed(self, check: Check, s: ThroughputSettings) -> list[Ahead]:
        from pipeline.bench.preflight import check as check_bench

        bench = check_bench(s)
        names = [model.work.name for model in bench.models]
        if len(set(names)) < len(names):
            raise SettingsError(
                f"models={s.models}: two files have one name, by which a baseline would be looked up",
                "give each a check of its own",
            )
        return [
            Ahead((check.name, model.work.name, case.name), _speed_measure(bench, case))
            for model in bench.models
            for case in bench.cases
        ]

    def _perplexity(self, check: Check, s: PerplexitySettings, progress: Progress | None) -> Measured:
        import pipeline

        result = _whole(pipeline.evaluate(s, progress))
        summary, plan = result.summary, _plan(Path(result.table))
        return Measured(
            check=check.name,
            job=check.job,
            variant=model_name(s.model.path),
            data=s.data.name,
            measure=plan["measure"],
            subject=plan["subject"],
            metrics=_figures(check.job, summary),
            bits={name: summary[name] for name in ("nll_sha256", "model_sha256")},
            windows=_windows(Path(result.table), "nll_sum_nats", None),
            **self._digests(s, summary["model_sha256"], check.n_traced),
        )

    def _variants(self, check: Check, s: CompareSettings, progress: Progress | None) -> list[Measured]:
        from pipeline import compare

        found = []
        for variant in _whole(compare.compare(s, progress)).summary["variants"]:
            plan = _plan(Path(variant["table"]))
            as_base = {f"base_{name}": value for name, value in plan["base"].items()}
            asked = replace(s.of_base(), model=ModelSettings(variant["path"]))
            found.append(
                Measured(
                    check=check.name,
                    job=check.job,
                    variant=variant["name"],
                    data=s.data.name,
                    measure=plan["measure"],
                    subject=plan["variant"] | as_base,
                    metrics=_figures(check.job, variant),
                    bits={name: variant[name] for name in ("nll_sha256", "kld_sha256", "model_sha256")},
                    windows=_windows(Path(variant["table"]), "nll_sum", "kld_sum"),
                    **self._digests(asked, variant["model_sha256"], check.n_traced),
                )
            )
        return found

    def _speeds(self, check: Check, s: ThroughputSettings) -> list[Measured]:
        import engine
        from pipeline.bench import throughput
        from pipeline.bench.preflight import check as check_bench

        bench = check_bench(s)
        summary = _whole(throughput.run(s)).summary
        found = []
        for model in bench.models:
            if model.sha256 not in self._tensors:
                with engine.open(model.path) as file:
                    self._tensors[model.sha256] = engine.tensor_digests(file)
            for case in bench.cases:
                metrics, samples = _of_test(summary["rows"], model, case)
                found.append(
                    Measured(
                        check=check.name,
                        job=check.job,
                        variant=model.work.name,
                        data=case.name,
                        measure=_speed_measure(bench, case),
                        subject=model.subject,
                        metrics=metrics,
                        bits={"model_sha256": model.sha256},
                        samples=samples,
                        tensors=self._tensors[model.sha256],
                    )
                )
        return found

    def _digests(self, s: PerplexitySettings, sha256: str, n_traced: int) -> dict[str, Any]:
        """`layers` and `tensors` of a measurement."""
        import engine

        with Preflight() as preflight:
            asked = preflight.ask(s)
            if sha256 not in self._tensors:
                self._tensors[sha256] = engine.tensor_digests(asked.file)
            return {"layers": _layers(asked, n_traced), "tensors": self._tensors[sha256]}


def model_name(path: str) -> str:
    """A model's name: that of its file."""
    return Path(path).name.removesuffix(".gguf")


def chosen(candidates: Sequence[int], n: int) -> list[int]:
    """The first of them, and others spread evenly to the last: `n`, or as many as there are."""
    at = np.unique(np.linspace(0, len(candidates) - 1, min(n, len(candidates))).round().astype(int))
    return [int(candidates[i]) for i in at]


def _whole(result: RunResult) -> RunResult:
    """A job's result, unless something is missing of it."""
    error = result.summary["error"]
    if error is not None:
        raise IncompleteError(error["message"], error["hint"] or "", kind=error["type"])
    return result


def _plan(folder: Path) -> dict[str, Any]:
    """What a run's folder says of measure and subject."""
    return dict(json.loads((folder / "plan.json").read_text()))


def _figures(job: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary that a suite can limit, and a few more; those that are not known left out."""
    told = {name: summary.get(name) for name in (*PRODUCED[job], *_ALSO_KEPT)}
    return {
        name: float(value)
        for name, value in told.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _windows(folder: Path, nll: str, kld: str | None) -> WindowSums:
    """The rows of a run's shards in window order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [*_WINDOWS, nll, *([] if kld is None else [kld])]
    shards = [
        pq.read_table(file, columns=names, partitioning=None) for file in sorted(folder.glob("shard-*"))
    ]
    rows = pa.concat_tables(shards).sort_by("window")
    columns: dict[str, npt.NDArray[Any]] = {name: rows.column(name).to_numpy() for name in names}
    return WindowSums(
        window=columns["window"].astype(np.int64),
        document=columns["document"].astype(np.int64),
        first_token=columns["first_token"].astype(np.int64),
        n_scored=columns["n_scored"].astype(np.int64),
        nll_sum=columns[nll],
        kld_sum=None if kld is None else columns[kld],
    )


def _layers(asked: Asked, n: int) -> dict[int, dict[str, str]]:
    """Checksums of the layers' outputs for `n` windows of those that begin from an empty cache."""
    import engine

    n_tokens = asked.stream.tokens.size
    begins = asked.protocol.begins(n_tokens)
    anew = range(asked.n_windows) if begins is None else begins[begins < asked.n_windows].tolist()
    windows = [asked.protocol.window(asked.stream.tokens, index) for index in chosen(anew, n)]
    if not windows:
        return {}
    model: engine.Model = engine.load_model(
        asked.file,
        threads=available_cores(),
        batch_tokens=max(window.tokens.size for window in windows),
        activations=asked.settings.engine.activations,
    )
    return {
        window.index: engine.trace(model, _batch(window), kv=asked.settings.engine.kv) for window in windows
    }


def _batch(window: Window) -> engine.Batch:
    """A window with its targets, and logits of its last token."""
    import engine

    positions = np.arange(window.tokens.size)
    outputs = positions == window.tokens.size - 1
    return engine.Batch(window.tokens, positions, targets=window.targets, outputs=outputs)


def _speed_measure(bench: Bench, case: Case) -> dict[str, Any]:
    """What is asked of a speed: the test, and the threads."""
    known = {key: bench.measure[key] for key in ("protocol", "protocol_version")}
    return known | asdict(case) | {"threads": bench.settings.engine.threads}


def _of_test(
    rows: Sequence[Mapping[str, Any]], model: Entrant, case: Case
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Figures of a test, medians of the rounds, and the rounds one by one."""
    from pipeline.bench.preflight import OURS

    told = asdict(case)
    of_test = {
        row["engine"]: row
        for row in rows
        if row["model_sha256"] == model.sha256 and all(row[name] == told[name] for name in told)
    }
    samples = by_round(of_test.pop(OURS), of_test)
    return {name: float(np.median(values)) for name, values in samples.items()}, samples


def by_round(own: Mapping[str, Any], peers: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """A test's figures in each round, against what the machine and the peers did in the same round.

    Args:
        own, peers: rows of `table=throughput`.
    """
    speeds = np.array(own["samples"])
    gflops, gb_per_s = (np.array(own[f"{name}_samples"]) for name in ("fma_gflops", "read_gb_per_s"))
    found = {
        "tok_per_s": speeds,
        "fma_share": speeds * own["flop_per_token"] / (gflops * 1e9),
        "read_share": speeds * own["read_bytes_per_token"] / (gb_per_s * 1e9),
    }
    found |= {f"ratio/{name}": speeds / np.array(row["samples"]) for name, row in peers.items()}
    return {name: values.tolist() for name, values in found.items()}
