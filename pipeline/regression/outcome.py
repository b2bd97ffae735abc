"""What a regression run leaves: what was measured, how it was judged, and what is to blame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class WindowSums:
    """Sums of each window of a measurement, in window order.

    Attributes:
        window, document, first_token, n_scored: (n,) int64; first_token is the window's place in the stream.
        nll_sum: (n,) float64, nats.
        kld_sum: (n,) float64, nats; None where nothing was compared.
    """

    window: NDArray[np.int64]
    document: NDArray[np.int64]
    first_token: NDArray[np.int64]
    n_scored: NDArray[np.int64]
    nll_sum: NDArray[np.float64]
    kld_sum: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Measured:
    """One measurement of a check: a model on a text, a variant beside its base, or one test of its speed.

    Attributes:
        check: its name in the suite.
        job: perplexity, compare or throughput.
        variant: the model's name, or the variant's.
        data: the data set's name; for a speed, the test's (ppl512, tg64@8).
        measure, subject: identity. A speed's measure is its test, its subject the model and the
            engine's number types.
        metrics: figures by name, as the job's JSON has them.
        bits: digests by name: nll_sha256, kld_sha256, model_sha256.
        samples: of a speed, each round's value of a metric.
        layers: of windows that were traced: window -> name of an output, in order -> SHA-256 of its bits.
        tensors: name -> SHA-256 of the tensor's bytes in the model file.
    """

    check: str
    job: str
    variant: str
    data: str
    measure: Mapping[str, Any]
    subject: Mapping[str, Any]
    metrics: Mapping[str, float]
    bits: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    windows: WindowSums | None = None
    layers: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> tuple[str, str, str]:
        """What a baseline's measurement is found by."""
        return self.check, self.variant, self.data


@dataclass(frozen=True)
class Gate:
    """A limit, judged.

    Attributes:
        value, baseline: figures or digests; None where there is none.
        limit: in words, as "<= 1.002 x baseline".
        passed: None where it could not be judged, which is no regression; `note` says why.
        note: one sentence for a person, "" where the figures say all.
    """

    name: str
    variant: str
    data: str
    metric: str
    value: float | str | None
    baseline: float | str | None
    limit: str
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class Culprit:
    """Why gates of one measurement are red, as far as it can be told.

    Attributes:
        metrics: of the gates that it explains.
        differs: fields of the subject, of the engine or of the machine -> (baseline's, today's).
        windows: those that moved most: window, document, first_token, n_scored, nll_diff (nats a token).
        documents: document, n_windows, nll_diff (nats a token), the same by document.
        window, layer: the traced window whose bits part, and the first output of the network where they do.
        tensors: of the model file, whose bytes are others.
        sentence: all that in one sentence.
    """

    name: str
    variant: str
    data: str
    metrics: Sequence[str]
    differs: Mapping[str, tuple[Any, Any]]
    windows: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    window: int | None = None
    layer: str | None = None
    tensors: Sequence[str] = ()
    sentence: str = ""


@dataclass(frozen=True)
class Baseline:
    """What a run is compared with.

    Attributes:
        name: how the user called it: a tag, an MLflow run, a file.
        source: where it was found, for people.
        run: MLflow's id, None for a file.
        provenance: of the run that made it: finished_at, version, numerics, git_sha, engine_digest, host, ...
    """

    name: str
    source: str
    run: str | None
    provenance: Mapping[str, Any]
    measured: Sequence[Measured]

    def of(self, measured: Measured) -> Measured | None:
        """The same measurement, then."""
        return next((other for other in self.measured if other.id == measured.id), None)


@dataclass(frozen=True)
class Outcome:
    """A regression run, for the reports.

    Attributes:
        verdict: "passed", "regression", "promoted", or "incomplete".
        provenance: as `Baseline` has it, of today.
        checks: names in the suite's order -> one line that says what is measured.
    """

    suite: str
    run_key: str
    verdict: str
    checks: Mapping[str, str]
    measured: Sequence[Measured]
    gates: Sequence[Gate]
    culprits: Sequence[Culprit]
    baseline: Baseline | None
    provenance: Mapping[str, Any]
    warnings: Sequence[str] = ()
