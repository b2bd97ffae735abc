"""What scores a shard of several pairs at once: a base and variants, all mapped, on the same windows.

    window -> base, variant 1, variant 2, ...       engine.Comparison: scores, divergences, most likely tokens
           -> a row for each pair in its own file   table=tokens/run_key=<pair key>/shard-<first window>

The divergences are rounded to float32 first, so that what is summed is what is kept: figures are the same to
the bit with and without the single targets.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline import numa
from pipeline.errors import ScoreError
from pipeline.shards import Shard
from pipeline.worker import EvalWorker, ShardResult, WorkerSpec, first_compiles, same, told_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    import engine
    from pipeline.scoring import Decode
    from pipeline.windows import Window

FACTORY = "pipeline.compare.worker:CompareWorker"


@dataclass(frozen=True)
class Donor:
    """A file and which of its tensors stand in the base's places."""

    path: str
    sha256: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class PairSpec:
    """A variant, and where its rows go.

    Attributes:
        model_path, model_sha256: of the variant's file; of the donor's, and a digest of its own, where there
            is a donor: then the variant is the base with tensors of another file.
        columns: identity columns of its rows.
    """

    key: str
    model_path: str
    model_sha256: str
    run_dir: str
    columns: Mapping[str, str | int | None] = field(default_factory=dict)
    donor: Donor | None = None

    @property
    def file(self) -> tuple[str, str]:
        """Path and SHA-256 of the file to open."""
        donor = self.donor
        return (self.model_path, self.model_sha256) if donor is None else (donor.path, donor.sha256)


@dataclass(frozen=True)
class CompareSpec(WorkerSpec):
    """What a worker of a comparison is told; the model is the base.

    Attributes:
        run_dir: folder of the states that documents' shards hand on.
        pairs: those that lack the shards that go with this.
        keep_tokens: rows hold every target; sketches otherwise.
    """

    pairs: tuple[PairSpec, ...] = ()
    keep_tokens: bool = True

    @property
    def models(self) -> list[tuple[str, str]]:
        """Path and SHA-256 of each model, the base first."""
        return [(self.model_path, self.model_sha256), *((p.model_path, p.model_sha256) for p in self.pairs)]

    @property
    def files(self) -> list[tuple[str, str]]:
        """Path and SHA-256 of each file to open, the base's first."""
        return list(dict.fromkeys([(self.model_path, self.model_sha256), *(p.file for p in self.pairs)]))


class CompareWorker(EvalWorker):
    """Scores shards of a base and variants; files stay mapped as long as the next spec has them too.

    Raises (on construction, and by `turn_to`): as `EvalWorker`, of whichever model.
    """

    spec: CompareSpec

    def __init__(self, spec: CompareSpec) -> None:
        self._files: dict[tuple[str, str], engine.GGUFFile] = {}
        self.compile_s = self.model_open_s = 0.0
        super().__init__(spec)

    def turn_to(self, spec: WorkerSpec) -> None:
        """Score shards with another choice of variants from now on.

        Should that fail there is no model open, and the worker can be turned again.
        """
        assert isinstance(spec, CompareSpec), "the driver hands out one kind of spec"
        for held in ("scorer", "model"):  # before the next are made
            self.__dict__.pop(held, None)
        try:
            self._open(spec)
            self._read(spec)
        except BaseException:
            self.close()
            raise
        self.spec = spec

    def _open(self, spec: WorkerSpec) -> None:
        """Map what is not mapped yet, let go of what is not asked for, and make what computes with all."""
        assert isinstance(spec, CompareSpec), "the driver hands out one kind of spec"
        started = time.perf_counter()
        import engine
        from pipeline.provenance import model_sha256

        cache = Path(spec.cache_dir)
        for gone in self._files.keys() - set(spec.files):
            self._files.pop(gone).close()
        opened = []
        for path, sha256 in set(spec.files) - self._files.keys():
            here = self._here(of_file(spec, path), cache)
            same(path, "SHA-256", model_sha256(here, cache), sha256, self.host)
            opening = time.perf_counter()
            self._files[path, sha256] = engine.open(numa.own_copy(str(here)), load=spec.engine.load)
            self.model_open_s += time.perf_counter() - opening
            opened.append(self._files[path, sha256])
        base = self._files[spec.files[0]]
        variants = [self._variant(base, pair) for pair in spec.pairs]
        queued = time.perf_counter()
        with first_compiles(cache / "locks"):
            waited_s = time.perf_counter() - queued
            is_cold = not all(engine.is_warm(file) for file in opened)
            compiled_s = sum(float(engine.warm_up(file, spec.engine.activations)) for file in opened)
            comparison = engine.Comparison(
                base,
                variants,
                threads=spec.engine.threads,
                batch_tokens=spec.engine.batch_tokens,
                activations=spec.engine.activations,
            )
            if opened:
                warming = time.perf_counter()
                comparison.compare(engine.Batch([0], [0], targets=[0]), comparison.new_cache(1, 1))
                compiled_s += time.perf_counter() - warming if is_cold else 0.0
        self.compile_s += compiled_s
        self.model = cast("engine.Model", comparison)  # what differs is `_decode`
        self.file = base
        self.open_s = max(0.0, time.perf_counter() - started - waited_s - compiled_s)

    def _variant(self, base: engine.GGUFFile, pair: PairSpec) -> engine.GGUFFile:
        import engine

        file = self._files[pair.file]
        return file if pair.donor is None else engine.with_tensors(base, file, pair.donor.tensors)

    @property
    def _decode(self) -> Decode:
        return cast("engine.Comparison", self.model).compare

    @property
    def _layers_s(self) -> npt.NDArray[np.float64]:
        """(M,) seconds that each model has spent on its layers."""
        return cast("engine.Comparison", self.model).layers_s.copy()

    def run(self, shard: Shard) -> ShardResult:
        """Score a shard's windows by all models and publish a file for each pair; the first to publish wins.

        Raises:
            ScoreError: a score is not finite; names the model, window and position. Pairs whose scores all
                are have been published, but for tables that were to travel to the driver.
            StorageFailure: a file, or a state for the next shard, cannot be written.
        """
        from pipeline import handover
        from pipeline.tables import TOKENS_SCHEMA, table

        started = time.perf_counter()
        spec = self.spec
        windows = self._windows(shard.first_window, shard.end)
        if shard.resumes:
            self._go_on(windows[0])
        before = self._layers_s
        scores = self.scorer.scores(windows)
        layers_s = (self._layers_s - before) / len(windows)
        if shard.hands_on:  # first: behind a finished shard there are states
            self._leave(shard.end)
        published = []
        fault: ScoreError | None = None
        for number, pair in enumerate(spec.pairs, 1):
            wrong = next(filter(None, map(self._fault, windows, scores, itertools.repeat(number))), None)
            if wrong is not None:
                fault = fault or wrong
                continue
            rows = [
                self._pair_row(w, found, number, shard) | {"layers_s": float(layers_s[number])}
                for w, found in zip(windows, scores, strict=True)
            ]
            published.append(self._publish(table(rows, TOKENS_SCHEMA), pair.run_dir, shard, pair.key))
        if fault is not None:
            raise fault
        if handover.is_own(spec):  # nobody else sees them
            for _, sha256 in spec.models:
                handover.drop(states_folder(handover.place(spec), sha256), [shard])
        return ShardResult(
            shard=shard,
            n_windows=len(windows) * len(spec.pairs),
            n_scored=sum(found.shape[-1] for found in scores),
            n_tokens=sum(window.tokens.size for window in windows) * len(spec.models),
            nll_sum_nats=sum(float(found[0].sum()) for found in scores),
            wall_s=time.perf_counter() - started,
            load_s=self.load_s,
            compile_s=self.compile_s,
            worker=self.name,
            path=spec.run_dir,
            model_open_s=self.model_open_s,
            **told_of(published),
        )

    def memory(self) -> dict[str, Any]:
        """This process's memory, as `pipeline.memory` reads it from the kernel, over all models' files."""
        from pipeline.memory import process_memory

        paths = [path for file in self._files.values() for path in file.paths]
        return {**process_memory(*dict.fromkeys(paths)), "model_path": self.spec.model_path}

    def close(self) -> None:
        """Give all mappings back; the worker cannot score before it is turned to a run again."""
        for held in ("model", "scorer"):
            self.__dict__.pop(held, None)
        files, self._files, self.file = self._files, {}, None
        for file in files.values():
            file.close()
        copy, self.copy = self.copy, None
        if copy is not None:
            copy.close()

    def _leave(self, first_window: int) -> None:
        """Save every model's state for the shard that begins with this window."""
        from pipeline import handover

        for (_, sha256), cache in zip(self.spec.models, self.scorer.cache.all, strict=True):
            folder = states_folder(handover.prepared(self.spec), sha256)
            folder.mkdir(exist_ok=True)
            handover.leave(folder, first_window, cache, self.scorer.slot, sha256)

    def _go_on(self, window: Window) -> None:
        """Have all caches hold what the document of a window has before it."""
        import numpy as np

        from pipeline import handover

        spec, scorer, index = self.spec, self.scorer, window.index
        scorer.slot = 0
        place = handover.place(spec)
        found = [
            handover.take_up(states_folder(place, sha256), index, cache, 0, sha256, window.position)
            for (_, sha256), cache in zip(spec.models, scorer.cache.all, strict=True)
        ]
        if not all(found):
            n_before = (window.distance or 0) // spec.protocol.window
            before = self._windows(index - n_before, index)
            scorer.scores([replace(w, targets=np.full_like(w.targets, -1)) for w in before])

    def _fault(self, window: Window, found: npt.NDArray[np.float64], number: int) -> ScoreError | None:
        """What is not finite of the base's scores, or of the variant's with that number."""
        import numpy as np

        from pipeline.scoring import first_broken

        models = self.spec.models
        for row, model in ((0, 0), (number, number), (len(models) + number - 1, number)):
            wrong = np.flatnonzero(~np.isfinite(found[row]))
            if wrong.size:
                what = "negative log-likelihood" if row == model else "divergence from the base"
                name = Path(models[model][0]).name
                position = window.position + int(np.flatnonzero(window.targets >= 0)[wrong[0]])
                return ScoreError(
                    f"window {window.index}: {what} of {name} at position {position} is "
                    f"{found[row, wrong[0]]}, expected a finite number ({wrong.size} of "
                    f"{found.shape[-1]} are not){first_broken(self._model(model), window)}",
                    "the model's weights overflow or hold NaN; check the file's SHA-256 and how it was made",
                )
        return None

    def _model(self, rank: int) -> engine.Model:
        """The base for 0, or a variant."""
        return cast("engine.Comparison", self.model).models[rank]

    def _pair_row(
        self, window: Window, found: npt.NDArray[np.float64], number: int, shard: Shard
    ) -> dict[str, Any]:
        """The row of a window for the variant of that number, from 1.

        Args:
            found: (3 M - 1, n) float64, as `engine.Comparison.compare` has it.
        """
        import numpy as np

        from pipeline.compare.sketch import sketch
        from pipeline.compare.statistics import probability_change, window_sums

        n_models = len(self.spec.models)
        nll_base, nll = found[0], found[number]
        kld = found[n_models + number - 1].astype(np.float32)
        top_base, top = (found[2 * n_models - 1 + row].astype(np.int32) for row in (0, number))
        row = window_sums(nll_base, nll, kld.astype(np.float64), top_base == top)
        targets: dict[str, Any] = {}
        if self.spec.keep_tokens:
            targets = {"nll_base": nll_base, "nll": nll, "kld": kld, "top_base": top_base, "top": top}
        else:
            sketched = {
                "kld": kld,
                "dp": probability_change(nll_base, nll),
                "nll_diff": np.abs(nll - nll_base),
            }
            for name, values in sketched.items():
                made = sketch(values)
                targets |= {f"{name}_keys": made.keys, f"{name}_counts": made.counts}
        counted = self.stream.counted(window)
        return {
            **self.spec.pairs[number - 1].columns,
            **row,
            **targets,
            **{name: counted[name] for name in ("document", "n_bytes", "n_words")},
            "window": window.index,
            "first_token": window.first_token,
            "first_scored": window.scored.start,
            "distance": window.distance,
            "n_tokens": int(window.tokens.size),
            "shard": shard.id,
            "worker": self.name,
            "host": self.host,
            "cpu": self.cpu,
            "threads": self.spec.engine.threads,
            "batch_tokens": self.spec.engine.batch_tokens,
        }


def of_file(spec: CompareSpec, path: str) -> WorkerSpec:
    """A spec of that file alone: only the base may be one that nodes fetch."""
    return spec if path == spec.model_path else replace(spec, model_path=path, wanted=None)


def identity(
    measure: Mapping[str, Any], base: Mapping[str, Any], variant: Mapping[str, Any]
) -> dict[str, Any]:
    """Identity columns of a pair's rows: the measure, and both subjects as `provenance.subject_of` says."""
    from pipeline.provenance import key_of, version

    columns = {"measure_key": key_of(measure), **measure, "version": version()}
    for side, subject in (("base", base), ("variant", variant)):
        columns |= {f"{side}_{name}": x for name, x in {"subject_key": key_of(subject), **subject}.items()}
    return columns


def states_folder(place: Path, model_sha256: str) -> Path:
    """Where, of a run's states (`handover.place`), those of a model lie."""
    return place / f".states-{model_sha256[:16]}"
