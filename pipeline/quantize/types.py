"""Which tensor types can be written, and what is said of the others."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

import engine
from pipeline.errors import SettingsError
from pipeline.gguf_writer import TYPES
from pipeline.quantize.mixtures import ALIASES, MIXTURES, NOT_ENCODABLE, Mixture, find_mixture

FLOATS = ("F32", "F16", "BF16")
"""Types that lose nothing by design: tensors of all others are quantized already."""

WEIGHTED = frozenset(
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
)
"""Types whose encoders ask how much an error counts, which an importance matrix says."""


def check_encodable(name: str, where: str) -> str:
    """The name of a type that can be written, as ggml has it.

    Args:
        where: what the message begins with.

    Raises:
        SettingsError: there is no such type, or it can be read only; names the nearest.
    """
    if name not in TYPES:
        raise SettingsError(
            f"{where}: there is no tensor type {name}{_nearest(name, sorted(engine.ENCODABLE))}",
            "choose one of these",
        )
    if name not in engine.ENCODABLE:
        try:
            engine.quantize(np.empty((0, TYPES[name].block_size), np.float32), name)
        except engine.UnsupportedQuant as error:  # which says what comes nearest
            raise SettingsError(f"{where}: {error}", "choose one of these") from error
    return name


def check_mixture(name: str) -> Mixture:
    """What llama-quantize calls so, in any case.

    Raises:
        SettingsError: there is no such mixture, or one of its types can be read only; names the nearest.
    """
    key, known = name.upper(), [*MIXTURES, *ALIASES]
    if key in known or key in NOT_ENCODABLE:
        return find_mixture(name)
    if key in TYPES and key not in engine.ENCODABLE:
        check_encodable(key, f"quantize.type={name}")
    raise SettingsError(f"quantize.type={name} is not known{_nearest(key, known)}", "choose one of these")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]}?" if close else "") + f" (known: {', '.join(known)})"
