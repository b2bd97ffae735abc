"""What a user can set of `pagemill imatrix`, and every check between those settings.

Not frozen for the reason that pipeline/settings.py has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

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
)


@dataclass
class ImatrixChoices:
    """Where the importance matrix goes."""

    out: str = MISSING
    overwrite: bool = False


@dataclass
class ImatrixSettings:
    """Everything the imatrix job can be told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    imatrix: ImatrixChoices = field(default_factory=ImatrixChoices)
    protocol: ProtocolSettings = field(default_factory=ProtocolSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    paths: PathsSettings = field(default_factory=PathsSettings)
    seed: int = 0
    dry_run: bool = False

    @property
    def reading(self) -> PerplexitySettings:
        """The same text read by the same model, which is all that preflight has to know."""
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "imatrix"}
        return PerplexitySettings(**shared)

    def validate(self) -> None:
        """Check what is this job's own; `reading` is checked by its own rules.

        Raises:
            SettingsError: listing all problems at once.
        """
        problems = []
        if not self.imatrix.out.strip() or self.imatrix.out == MISSING:
            problems.append("imatrix.out is not set; give imatrix.out=FILE.gguf")
        if self.protocol.name != "windows":
            problems.append(
                f"protocol.name={self.protocol.name} is not of this job; expected windows: whole ones, each "
                "from an empty cache, as llama-imatrix reads them"
            )
        if self.data.weight is not None:
            problems.append(
                f"data.weight={self.data.weight} is not of this job: every token counts once; leave it out"
            )
        if problems:
            many = f"{len(problems)} settings cannot be used:\n  " if len(problems) > 1 else ""
            raise SettingsError(
                many + "\n  ".join(problems),
                "correct them on the command line; `pagemill imatrix --help` lists all keys",
            )

    def resolved(self) -> ImatrixSettings:
        """A copy with the file's `~` expanded and its path absolute."""
        return replace(self, imatrix=replace(self.imatrix, out=absolute(self.imatrix.out)))
