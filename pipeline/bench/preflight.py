"""Everything about a benchmark that can be refused before an engine is started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import capacity, provenance, store
from pipeline.bench.limits import pick_cores
from pipeline.bench.players import check_peers
from pipeline.bench.settings import ThroughputSettings
from pipeline.bench.work import Case, Work, cases, work_of
from pipeline.folders import require_local
from pipeline.preflight import model_digest, open_model

if TYPE_CHECKING:
    import engine

OURS = "pagemill"
VERSION = 1
"""Raised when the same settings have engines do other work; part of the measure."""


@dataclass(frozen=True)
class Entrant:
    """A model that the benchmark runs on."""

    path: str
    sha256: str
    work: Work
    subject: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A benchmark that nothing speaks against."""

    settings: ThroughputSettings
    models: list[Entrant]
    cases: list[Case]
    cores: list[int]
    measure: dict[str, Any]
    warnings: list[str]

    @property
    def measure_key(self) -> str:
        """What is asked: the tests."""
        return provenance.key_of(self.measure)

    @property
    def run_key(self) -> str:
        """What is asked and who: the tests, the models, and what of our engine can change a score."""
        return provenance.key_of([self.measure, [model.subject for model in self.models]])

    @property
    def own(self) -> dict[str, Any]:
        """Settings of our engine, as its player takes them."""
        return {key: value for key, value in asdict(self.settings.engine).items() if key != "threads"}


def check(settings: ThroughputSettings) -> Bench:
    """Check settings, peers, cores, folders, models and memory; nothing is written but the folders.

    Raises:
        RefusedError: with all that a user needs to put it right.
    """
    warnings = settings.validate()
    check_peers(settings.peer)
    s = settings.resolved()
    given = settings.cluster.threads_per_worker is not None
    capacity.check_threads(s.engine.threads, "cluster.threads_per_worker" if given else "engine.threads")
    require_local(s.paths.results, "throughput")
    store.probe(Path(s.paths.results), "paths.results")
    store.probe(Path(s.paths.cache), "paths.cache")
    tests = cases(s.bench)
    models = [_entrant(path, s, tests) for path in s.paths_of_models]
    measure = {"protocol": "throughput", "protocol_version": VERSION}
    measure |= {key: value for key, value in asdict(s.bench).items() if key != "repeats"}
    return Bench(s, models, tests, pick_cores(s.engine.threads), measure, warnings)


def _entrant(path: str, s: ThroughputSettings, tests: list[Case]) -> Entrant:
    with open_model(path) as file:
        for case in tests:
            _check_memory(file, s, case)
        work = work_of(file)
    digest = model_digest(path, Path(s.paths.cache))
    return Entrant(path, digest, work, provenance.subject_of(digest, s.engine.kv, s.engine.activations))


def _check_memory(file: engine.GGUFFile, s: ThroughputSettings, case: Case) -> None:
    import engine

    def need(batch_tokens: int) -> int:
        whole = max(1, min(batch_tokens // case.length, case.n_seqs))
        own = engine.footprint(
            file,
            threads=s.engine.threads,
            batch_tokens=batch_tokens,
            n_slots=whole if case.kind == "perplexity" else case.n_seqs,
            capacity=case.length,
            kv=s.engine.kv,
            activations=s.engine.activations,
            fleeting=case.kind == "perplexity" and case.length <= batch_tokens,
        )
        return capacity.BASE_BYTES + own + capacity.loaded_bytes(file, s.engine.load, 1)

    subject = f"{case.name} with {case.n_seqs} sequences of {case.length} tokens wants"
    capacity.check_batch(need, s.engine.batch_tokens, case.length, subject, " or engine.kv=f16")
