"""What a comparison can be told, and every check that needs no file."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from pipeline.errors import SettingsError
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
    absolute,
    nearest,
    unknown,
)

STOPS = ("never", "decided")
SWAPPED_BY = ("group", "tensor", "layer")
FIGURES = (
    "ppl", "ppl_stderr", "ppl_stderr_clustered", "ppl_base", "ppl_base_stderr",
    "ppl_base_stderr_clustered", "corr", "ln_ratio", "ln_ratio_stderr", "ln_ratio_stderr_clustered",
    "ln_ratio_low", "ln_ratio_high", "smallest_ln_ratio", "ratio", "ratio_stderr", "ppl_diff",
    "ppl_diff_stderr", "kld_mean", "kld_stderr", "kld_stderr_clustered", "kld_mean_low", "kld_mean_high",
    "kld_max", "kld_p999", "kld_p99", "kld_p95", "kld_p90", "kld_p50", "kld_p10", "kld_p05", "kld_p01",
    "kld_p001", "kld_min", "dp_mean", "dp_stderr", "dp_stderr_clustered", "dp_rms", "dp_rms_stderr",
    "dp_max", "dp_p999", "dp_p99", "dp_p95", "dp_p90", "dp_p75", "dp_p50", "dp_p25", "dp_p10", "dp_p05",
    "dp_p01", "dp_p001", "dp_min", "same_top", "same_top_stderr", "same_top_stderr_clustered",
)  # fmt: skip
"""Figures of a variant, as `pipeline.compare.statistics` has them; null where they are not known."""
LIMITED = ("bytes", "bpw", *FIGURES)
"""What can be limited."""

_MORE_IS_BETTER = ("same_top", "corr")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_LIMIT = re.compile(r"\s*(<=|>=|<|>)?\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass
class StopSettings:
    """When no more windows are scored: `decided`, when all neighbours on the size ladder are told apart.

    `alpha` is the probability that any of these decisions is wrong.
    """

    name: str = "never"
    alpha: float = 0.05


@dataclass
class OnTheSpotSettings:
    """How variants that are named by a type are made from the base; the files stay in `paths.cache`."""

    allow_requantize: bool = False
    imatrix: str | None = None


@dataclass
class LogitsSettings:
    """llama.cpp's file of the base's logits, 16 bits each (logit_files.py), written before anything else."""

    out: str | None = None
    overwrite: bool = False


@dataclass
class SensitivitySettings:
    """Which tensors need bits (sensitivity.py): asked for by any of these.

    `groups` are regular expressions, searched in tensors' names; none: all matrices. `by` says which of these
    tensors of the variant take the base's places together: those of a `group` (without expressions: of a kind
    of matrix), each `tensor` by itself, or those of a `layer`. `target_bytes` or `target_bpw` is the size of
    a mixture to be proposed.
    """

    by: str | None = None
    groups: list[str] = field(default_factory=list)
    target_bytes: int | None = None
    target_bpw: float | None = None

    @property
    def is_asked(self) -> bool:
        """Whether anything is to be swapped."""
        return self != SensitivitySettings()

    @property
    def way(self) -> str:
        """What is swapped together."""
        return self.by or "group"

    def problems(self, n_variants: int, stop: str) -> list[str]:
        """A sentence for each value that cannot be used."""
        if not self.is_asked:
            return []
        found = unknown([("sensitivity.by", self.way, SWAPPED_BY)])
        if n_variants != 1:
            found.append(f"sensitivity is of one variant, and there are {n_variants}; choose one")
        if stop != "never":
            found.append(f"sensitivity with stop.name={stop}: groups are compared on all windows; stop=never")
        if self.target_bytes is not None and self.target_bpw is not None:
            found.append("sensitivity.target_bytes and sensitivity.target_bpw are both set; give one")
        sizes = {"target_bytes": self.target_bytes, "target_bpw": self.target_bpw}
        found += [
            f"sensitivity.{key}={size} is no size; expected more than 0"
            for key, size in sizes.items()
            if size is not None and not 0 < size < float("inf")
        ]
        for text in self.groups:
            try:
                re.compile(text)
            except re.error as error:
                found.append(f"sensitivity.groups: {text!r} is no regular expression: {error}")
            if not text:
                found.append("sensitivity.groups: an empty expression is found in every name; leave it out")
        return found


@dataclass
class CompareSettings:
    """Everything the compare job can be told."""

    base: ModelSettings = field(default_factory=ModelSettings)
    variants: list[str] = field(default_factory=list)
    data: DataSettings = field(default_factory=DataSettings)
    protocol: ProtocolSettings = field(default_factory=lambda: ProtocolSettings(limit=40))
    engine: EngineSettings = field(default_factory=EngineSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    paths: PathsSettings = field(default_factory=PathsSettings)
    stop: StopSettings = field(default_factory=StopSettings)
    quantize: OnTheSpotSettings = field(default_factory=OnTheSpotSettings)
    logits: LogitsSettings = field(default_factory=LogitsSettings)
    sensitivity: SensitivitySettings = field(default_factory=SensitivitySettings)
    limits: dict[str, Any] = field(default_factory=dict)
    keep_tokens: bool = True
    seed: int = 0
    dry_run: bool = False

    def validate(self) -> list[str]:
        """Check every value and every pair; returns warnings.

        Raises:
            SettingsError: listing all problems at once.
        """
        problems = []
        if not self.base.path.strip() or self.base.path == MISSING:
            problems.append("base.path is not set; give base.path=FILE.gguf")
        if not self.variants and self.logits.out is None:
            problems.append("variants is empty; give 'variants=[FILE.gguf,Q4_K_M,...]'")
        problems += [f"variants[{i}] is empty" for i, name in enumerate(self.variants) if not name.strip()]
        problems += unknown([("stop.name", self.stop.name, STOPS)])
        if not 0 < self.stop.alpha < 0.5:
            problems.append(f"stop.alpha={self.stop.alpha} is no error rate; expected more than 0, under 0.5")
        if self.data.weight is not None:
            problems.append(
                f"data.weight={self.data.weight}: a comparison weighs all windows alike; leave it out"
            )
        problems += self.sensitivity.problems(len(self.variants), self.stop.name)
        for name, limit in self.limits.items():
            try:
                Limit.read(name, limit)
            except SettingsError as error:
                problems.append(str(error))
        if problems:
            many = f"{len(problems)} settings cannot be used:\n  " if len(problems) > 1 else ""
            raise SettingsError(
                many + "\n  ".join(problems),
                "correct them on the command line; `pagemill compare --help` lists all keys",
            )
        try:
            return self.of_base().validate()
        except SettingsError as error:
            raise SettingsError(
                str(error), error.hint.replace("perplexity --help", "compare --help")
            ) from error

    def resolved(self) -> CompareSettings:
        """A copy with `~` expanded and paths absolute; variants are told apart later."""
        base = self.of_base().resolved()
        imatrix, logits = self.quantize.imatrix, self.logits.out
        return replace(
            self,
            base=base.model,
            data=base.data,
            engine=base.engine,
            cluster=base.cluster,
            paths=base.paths,
            quantize=replace(self.quantize, imatrix=None if imatrix is None else absolute(imatrix)),
            logits=replace(self.logits, out=None if logits is None else absolute(logits)),
        )

    def of_base(self) -> PerplexitySettings:
        """The same questions to the base alone."""
        return PerplexitySettings(
            model=self.base,
            data=self.data,
            protocol=self.protocol,
            engine=self.engine,
            cluster=self.cluster,
            tracking=self.tracking,
            paths=self.paths,
            seed=self.seed,
            dry_run=self.dry_run,
        )


@dataclass(frozen=True)
class Limit:
    """A bound of a figure that every variant has to keep."""

    metric: str
    comparison: str
    bound: float

    @classmethod
    def read(cls, metric: str, told: Any) -> Limit:
        """A number is the worst value allowed; `<=x`, `>=x`, `<x`, `>x` say it outright.

        Raises:
            SettingsError: an unknown metric, or no limit.
        """
        if metric not in LIMITED:
            raise SettingsError(f"limits.{metric} is not known{nearest(metric, LIMITED)}")
        match = None if isinstance(told, bool) else _LIMIT.fullmatch(str(told))
        if match is None:
            raise SettingsError(
                f"limits.{metric}={told} is no limit; expected a number, or '<=0.05', '>=0.9'"
            )
        usual = ">=" if metric in _MORE_IS_BETTER else "<="
        return cls(metric, match[1] or usual, float(match[2]))

    def __str__(self) -> str:
        return f"{self.comparison} {self.bound:g}"

    def is_kept(self, value: float | None) -> bool:
        """Whether a value keeps it; what is not known keeps nothing."""
        return value is not None and _COMPARISONS[self.comparison](value, self.bound)


def broken_limits(
    limits: Mapping[str, Any], variants: list[dict[str, Any]]
) -> list[dict[str, str | float | None]]:
    """Variant, metric, value and limit of each limit that a variant does not keep."""
    read = [Limit.read(metric, told) for metric, told in limits.items()]
    return [
        {"variant": v["name"], "metric": limit.metric, "value": v.get(limit.metric), "limit": str(limit)}
        for v in variants
        for limit in read
        if not limit.is_kept(v.get(limit.metric))
    ]
