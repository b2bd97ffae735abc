"""config.json read with suspicion: every key by all the names it goes by, and no two that disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError


class Config:
    """The settings of a checkpoint; what the original Mamba nests in `ssm_cfg` is on one level with all."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        values = _plain(values)
        nested = values.get("ssm_cfg")
        self.values = {**(nested if isinstance(nested, dict) else {}), **values}

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first name that is there and not null.

        Raises:
            ModelError: two of the names have different values.
        """
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        if not found:
            return default
        (name, value), *others = found.items()
        for other, said in others:
            if said != value:
                raise self.refusal(f"{name} = {value!r}, but {other} = {said!r}; they mean the same")
        return value

    def integer(self, *names: str, default: int | None = None) -> int:
        """A positive int; missing without a default, it is refused."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.refusal(f"{names[0]} is {value!r}, expected a positive int")
        return value

    def real(self, *names: str, default: float | None = None) -> float:
        """A positive finite number; missing without a default, it is refused."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.refusal(f"{names[0]} is {value!r}, expected a positive number")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        """True or false."""
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            raise self.refusal(f"{names[0]} is {value!r}, expected true or false")
        return value

    def expect(self, *names: str, values: Sequence[Any], why: str) -> None:
        """Refuses a key, where it is there, whose value is none of `values`."""
        value = self.get(*names, default=values[0])
        if value not in values:
            raise self.refusal(f"{names[0]} = {value!r} cannot be converted, expected {values[0]!r}: {why}")

    def refusal(self, what: str, hint: str = "") -> ModelError:
        """What to raise of a setting that cannot be used."""
        return ModelError(
            f"{self.path}: {what}", hint or "is config.json the one that belongs to these weights?"
        )


def _plain(value: Any) -> Any:
    """Infinity and NaN as floats; transformers 5 writes them as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        tag = value.get("__float__")
        if len(value) == 1 and isinstance(tag, str):
            return {"Infinity": math.inf, "-Infinity": -math.inf}.get(tag, math.nan)
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
