"""What a user can set of `pagemill quantize`, and every check that needs no file.

Not frozen for the reason that pipeline/settings.py has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from omegaconf import MISSING

from pipeline.errors import SettingsError
from pipeline.settings import ModelSettings, PathsSettings, absolute


@dataclass
class QuantizeChoices:
    """What becomes of a model.

    Attributes:
        type: a mixture, as llama-quantize names them, in any case.
        imatrix: a file of importance matrices, or none.
        tensor_types: "REGEX=TYPE"; a tensor gets the type of the first that is found in its name.
        allow_requantize: whether weights that are quantized already are quantized again.
        overwrite: whether a file that is there is replaced.
    """

    type: str = MISSING
    out: str = MISSING
    imatrix: str | None = None
    tensor_types: list[str] = field(default_factory=list)
    allow_requantize: bool = False
    overwrite: bool = False


@dataclass
class EncodingSettings:
    """How the work is done; the file's bytes do not depend on it."""

    threads: int = 1


class Rule(NamedTuple):
    """One of `tensor_types`: `text` is how it was written."""

    text: str
    pattern: re.Pattern[str]
    type: str


@dataclass
class QuantizeSettings:
    """Everything the quantize job can be told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    quantize: QuantizeChoices = field(default_factory=QuantizeChoices)
    engine: EncodingSettings = field(default_factory=EncodingSettings)
    paths: PathsSettings = field(default_factory=PathsSettings)
    dry_run: bool = False

    def validate(self) -> None:
        """Check what needs no file.

        Raises:
            SettingsError: a path is empty, threads are too few, a type is unknown or cannot be written, or a
                rule is none.
        """
        from pipeline.quantize.types import check_mixture  # NumPy, which `--help` does not need

        for key, value in (
            ("model.path", self.model.path),
            ("quantize.type", self.quantize.type),
            ("quantize.out", self.quantize.out),
        ):
            if not value.strip() or value == MISSING:
                raise SettingsError(f"{key} is not set", f"give {key}=...")
        if self.engine.threads < 1:
            raise SettingsError(f"engine.threads={self.engine.threads} is too small", "give 1 or more")
        check_mixture(self.quantize.type)
        self.rules()

    def resolved(self) -> QuantizeSettings:
        """A copy with `~` expanded and paths absolute."""
        own = self.quantize.imatrix
        return replace(
            self,
            model=replace(self.model, path=absolute(self.model.path)),
            quantize=replace(
                self.quantize,
                out=absolute(self.quantize.out),
                imatrix=None if own is None else absolute(own),
            ),
        )

    def rules(self) -> list[Rule]:
        """`tensor_types`, read; SettingsError for one that cannot be."""
        return [_rule(text) for text in self.quantize.tensor_types]


def _rule(text: str) -> Rule:
    from pipeline.quantize.types import check_encodable

    pattern, equals, name = text.rpartition("=")
    if not (equals and pattern and name.strip()):
        raise SettingsError(
            f"quantize.tensor_types: {text!r} is not of the form REGEX=TYPE", "for example attn_v=Q8_0"
        )
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SettingsError(
            f"quantize.tensor_types: {text!r}: {pattern!r} is no regular expression: {error}",
            "write it as Python's re does; a literal character of it has a backslash in front",
        ) from error
    return Rule(text, compiled, check_encodable(name.strip().upper(), f"quantize.tensor_types: {text!r}"))
