"""A file's bytes -> its documents: a text is one, JSONL has one a line, Parquet one a row.

A plain text is taken as llama.cpp takes it (protocol.md 2.1): its bytes as they are, less exactly one newline
at the very end. Bytes that are not UTF-8 are refused with their place (`data.errors=strict`), or become one
U+FFFD for each run that could not begin or go on a character (`replace`, as Python's codec has it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import DataError
from pipeline.settings import DataSettings
from pipeline.sources import Source

_REPLACEMENT = "\ufffd"
_NAMED_AT_MOST = 12
_ICONV = "convert it, for example: iconv -f LATIN1 -t UTF-8 FILE > NEW"
_LENIENT = ", or give data.errors=replace to put U+FFFD there"


@dataclass
class Documents:
    """Texts in order; `weights` has one for each, or none at all; `n_replaced` counts U+FFFD put in."""

    texts: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    n_replaced: int = 0


def documents_of(source: Source, settings: DataSettings) -> Documents:
    """The documents of one file, in the format that `data.format` says.

    Raises:
        DataError: not that format, no such field or column, a row without text or with a bad weight, invalid
            UTF-8.
    """
    found = Documents()
    {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[settings.format](source, settings, found)
    return found


def _text(source: Source, settings: DataSettings, found: Documents) -> None:
    if source.raw.startswith(b"PAR1") and source.raw.endswith(b"PAR1"):
        raise DataError(f"{source.name}: is a Parquet file, expected a text", "use data=parquet")
    found.texts.append(_decode(source.name, source.raw, settings, found).removesuffix("\n"))


def _jsonl(source: Source, settings: DataSettings, found: Documents) -> None:
    text = _decode(source.name, source.raw, settings, found)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source.name}: line {number:,}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{where} is not JSON: {error}", "data.format=jsonl wants one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{where} is a JSON {type(record).__name__}, expected an object", "see data.format"
            )
        found.texts.append(_whole(where, _field(where, record, settings.field), settings, found))
        if settings.weight is not None:
            found.weights.append(_weight(where, settings.weight, record.get(settings.weight)))


def _field(where: str, record: dict[str, Any], name: str) -> str:
    if isinstance(record.get(name), str):
        return str(record[name])
    has = ", ".join(map(repr, record)) or "none"
    found = "is no string" if name in record else f"is missing; it has {has}"
    raise DataError(f"{where}: field {name!r} {found}", "name the text's field by data.field=NAME")


def _whole(where: str, text: str, settings: DataSettings, found: Documents) -> str:
    """JSON can hold halves of surrogate pairs, which no UTF-8 has."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        if settings.errors == "strict":
            raise DataError(
                f"{where}: field {settings.field!r} holds half of a surrogate pair",
                f"it is no text; fix it{_LENIENT}",
            ) from None
    replaced = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    found.n_replaced += replaced.count(_REPLACEMENT) - text.count(_REPLACEMENT)
    return replaced


def _parquet(source: Source, settings: DataSettings, found: Documents) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(source.raw))
        for name in filter(None, (settings.field, settings.weight)):
            _refuse_unless_column(source.name, file.schema_arrow, name, settings)
        row = 0
        for batch in file.iter_batches(columns=list(filter(None, (settings.field, settings.weight)))):
            _rows(source.name, row, batch, settings, found)
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{source.name}: cannot be read as Parquet: {reason}", "is it one, and is the file complete?"
        ) from error


def _refuse_unless_column(name: str, schema: Any, column: str, settings: DataSettings) -> None:
    import pyarrow.types as kinds

    if column not in schema.names:
        has = ", ".join(map(repr, schema.names[:_NAMED_AT_MOST]))
        more = len(schema.names) - _NAMED_AT_MOST
        has += f" and {more} more" if more > 0 else ""
        key = "data.field" if column == settings.field else "data.weight"
        raise DataError(f"{name}: has no column {column!r}; it has {has or 'none'}", f"give {key}=COLUMN")
    kind = schema.field(column).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    texts: list[Callable[[Any], bool]] = [kinds.is_string, kinds.is_large_string, kinds.is_string_view]
    texts += [kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view]
    if column == settings.field and not any(is_kind(kind) for is_kind in texts):
        raise DataError(
            f"{name}: column {column!r} is {kind}, expected strings", "name the text's column by data.field"
        )


def _rows(name: str, first: int, batch: Any, settings: DataSettings, found: Documents) -> None:
    import pyarrow as pa

    # Arrow does not look whether its strings are UTF-8; as binary they come out as they are.
    texts = batch.column(settings.field).cast(pa.large_string(), safe=False).cast(pa.large_binary())
    weights = [None] * len(texts) if settings.weight is None else batch.column(settings.weight).to_pylist()
    for number, (raw, weight) in enumerate(zip(texts.to_pylist(), weights, strict=True), first + 1):
        where = f"{name}: row {number:,}"
        if raw is None:
            raise DataError(
                f"{where}: column {settings.field!r} is null", "a document needs a text, empty if need be"
            )
        found.texts.append(_decode(where, raw, settings, found))
        if settings.weight is not None:
            found.weights.append(_weight(where, settings.weight, weight))


def _weight(where: str, name: str, value: object) -> float:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number > 0):
        raise DataError(
            f"{where}: weight {name!r} is {value!r}, expected a number above 0",
            "leave a document that is to weigh nothing out of the data",
        )
    return number


def _decode(where: str, raw: bytes, settings: DataSettings, found: Documents) -> str:
    """UTF-8 with nothing translated: a CRLF stays a CRLF."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if settings.errors == "strict":
            raise _not_utf8(where, raw, error) from None
    text = raw.decode("utf-8", "replace")
    found.n_replaced += text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())
    return text


def _not_utf8(where: str, raw: bytes, error: UnicodeDecodeError) -> DataError:
    hint = _ICONV + _LENIENT
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        hint = "it begins like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
    line = raw.count(b"\n", 0, error.start) + 1
    byte = raw[error.start]
    return DataError(
        f"{where}: byte {error.start:,} (line {line:,}) is 0x{byte:02x}, not UTF-8: {error.reason}", hint
    )
