"""Variants that are named by a type: made from the base, kept in `paths.cache`, found there the next time.

    <cache>/quantized/<base>.<TYPE>.<16 hex>.gguf

The digits are of the base's SHA-256, the type, the importance matrix's SHA-256 and the encoders' sources, so
a file that is there is the one that would be written.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import provenance
from pipeline.errors import ModelError, RefusedError, SettingsError, StoreError
from pipeline.settings import nearest

if TYPE_CHECKING:
    from pipeline.compare.settings import CompareSettings
    from pipeline.quantize.settings import QuantizeSettings

log = logging.getLogger(__name__)


def told_apart(variants: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files, and types by their usual names; a file that is there is a file, whatever it is called.

    Raises:
        SettingsError: neither a file nor a type.
    """
    from pipeline.quantize.mixtures import ALIASES, MIXTURES, NOT_ENCODABLE, find_mixture

    files, types = [], []
    for variant in variants:
        if Path(variant).expanduser().exists() or "/" in variant or variant.endswith(".gguf"):
            files.append(variant)
        elif variant.upper() in {*MIXTURES, *ALIASES, *NOT_ENCODABLE}:
            try:
                types.append(find_mixture(variant).name)
            except SettingsError as error:
                told = str(error).replace("quantize.type=", "variants: ")
                raise SettingsError(told, error.hint) from error
        else:
            known = [name.lower() for name in MIXTURES]
            raise SettingsError(
                f"variants: {variant} is neither a file that is there nor a type{nearest(variant, known)}"
            )
    return files, types


def path_of(type_name: str, settings: CompareSettings, base_sha256: str) -> Path:
    """Where the base in that type lies, or will.

    Raises:
        ModelError: the importance matrix cannot be read.
    """
    cache_folder, imatrix = Path(settings.paths.cache), settings.quantize.imatrix
    try:
        weights = None if imatrix is None else provenance.file_sha256(Path(imatrix), cache_folder)
    except OSError as error:
        raise ModelError(f"{imatrix}: {error.strerror}", "check quantize.imatrix") from error
    key = provenance.key_of([base_sha256, type_name, weights, _encoders()])
    stem = Path(settings.base.path).name.removesuffix(".gguf")
    return cache_folder / "quantized" / f"{stem}.{type_name}.{key}.gguf"


def check(type_name: str, settings: CompareSettings, path: Path) -> None:
    """Refuse what could not be quantized; nothing is written.

    Raises:
        RefusedError: as `pipeline.quantize.quantize`.
    """
    from pipeline.quantize import quantize

    if path.exists():
        return
    _make_folder(path.parent)
    quantize(_settings(type_name, settings, path, dry_run=True))


def make(type_name: str, settings: CompareSettings, path: Path) -> None:
    """Write the file unless it is there.

    Raises:
        PipelineError: as `pipeline.quantize.quantize`.
    """
    from pipeline.quantize import quantize

    if path.exists():
        return
    log.info("quantizing %s to %s", Path(settings.base.path).name, type_name)
    try:
        quantize(_settings(type_name, settings, path, dry_run=False))
    except RefusedError:
        if not path.exists():  # else another comparison has written the same a moment ago
            raise


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be created: {error.strerror}", "check paths.cache") from error


def _settings(type_name: str, settings: CompareSettings, path: Path, *, dry_run: bool) -> QuantizeSettings:
    from pipeline.quantize.settings import EncodingSettings, QuantizeChoices, QuantizeSettings
    from pipeline.runtime import available_cores

    return QuantizeSettings(
        model=settings.base,
        quantize=QuantizeChoices(
            type=type_name,
            out=str(path),
            imatrix=settings.quantize.imatrix,
            allow_requantize=settings.quantize.allow_requantize,
        ),
        engine=EncodingSettings(available_cores()),
        paths=settings.paths,
        dry_run=dry_run,
    )


@cache
def _encoders() -> str:
    """Digest of the sources that decide a file's bytes."""
    import engine
    from pipeline.quantize import mixtures

    digest = hashlib.sha256(Path(mixtures.__file__).read_bytes())
    for source in sorted(Path(inspect.getfile(engine.quantize)).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
