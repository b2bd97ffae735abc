"""The same model in other weight types, for benchmarks.

What was lost in the file that it starts from stays lost, so these files are good for speed and for nothing
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.bench.work import FILE_TYPES
from pipeline.quantize import quantize
from pipeline.quantize.mixtures import find_mixture
from pipeline.quantize.settings import EncodingSettings, QuantizeChoices, QuantizeSettings
from pipeline.runtime import available_cores
from pipeline.settings import ModelSettings


def requantized(source: Path, folder: Path, types: Sequence[str]) -> list[Path]:
    """Files `STEM.TYPE.gguf` of a model in a folder, those that are not there yet written now.

    Args:
        source: a GGUF file; its own type, if asked for, is the file itself.
        types: such as "Q4_K_M", as llama.cpp names file types.

    Raises:
        SettingsError: an unknown type; and as `quantize`.
    """
    import engine

    names = [find_mixture(name).name for name in types]
    with engine.open(source) as file:
        number = file.metadata.get("general.file_type")
    own = FILE_TYPES.get(number) if isinstance(number, int) else None
    stem = source.name.removesuffix(".gguf").removesuffix(f".{own}")
    made = [source if name == own else folder / f"{stem}.{name}.gguf" for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in zip(names, made, strict=True):
        if not path.exists():
            choices = QuantizeChoices(name, str(path), allow_requantize=True)
            encoding = EncodingSettings(available_cores())
            quantize(QuantizeSettings(ModelSettings(str(source)), choices, encoding))
    return made
