"""The store read back: rows of finished and unfinished runs, chosen, sorted and written as text.

DuckDB reads the Parquet files where they lie, at any time, also while a run adds to them: a published file
never changes. Those of an object store are fetched first. Only files of a table are read, by their names
(`shard-*`, `run-*`): a run's folder holds its plan as well. Columns that older files lack are null.

DuckDB is imported by the functions that use it, and by nothing else. A condition is the user's own SQL; once
the files are read in, the database is closed to everything outside it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import SettingsError, StorageFailure, StoreError
from pipeline.folders import folder_of, local_files
from pipeline.settings import PathsSettings, absolute, nearest

TABLES = {
    "runs": "run-*.parquet",
    "windows": "shard-*.parquet",
    "throughput": "run-*.parquet",
    "comparisons": "run-*.parquet",
    "tokens": "shard-*.parquet",
    "regressions": "run-*.parquet",
}
FORMATS = ("table", "csv", "markdown", "json")
COLUMNS = (
    "finished_at", "model", "data_name", "protocol", "protocol_window", "n_windows",
    "ppl", "ppl_stderr_clustered", "bits_per_byte", "tok_per_s", "ok", "run_key",
)  # fmt: skip
"""Shown of a run unless others are asked for; `model` is the last part of `model_path`."""
SPEEDS = (
    "measured_at", "model", "type", "engine", "test", "threads", "tok_per_s", "p10", "p90", "n", "fma_share",
    "read_share", "run_key",
)  # fmt: skip
"""The same of a benchmark's row."""
COMPARED = (
    "finished_at", "base_name", "name", "bytes", "bpw", "n_windows", "ppl", "ln_ratio",
    "ln_ratio_stderr_clustered", "kld_mean", "kld_stderr_clustered", "same_top", "p_vs_next", "ok", "run_key",
)  # fmt: skip
"""The same of a variant's row."""
PAIRED = (
    "window", "document", "n_scored", "nll_base_sum", "nll_sum", "kld_sum", "kld_max", "dp_sum", "n_same_top",
    "run_key",
)  # fmt: skip
"""The same of a window of a pair; the lists of its targets are many."""
GATED = (
    "finished_at", "suite", "check", "variant", "data", "verdict", "broken", "ppl", "kld_mean", "tok_per_s",
    "fma_share", "version", "numerics", "git_sha", "run_key",
)  # fmt: skip
"""The same of a measurement of a suite; its figures are taken from the map `metrics`."""

_USUAL = {
    "runs": COLUMNS,
    "throughput": SPEEDS,
    "comparisons": COMPARED,
    "tokens": PAIRED,
    "regressions": GATED,
}
_LATEST_OF = {
    "runs": "run_key",
    "comparisons": "run_key, pair_key",
    "regressions": 'run_key, "check", variant, data',
}
_VERSION = "v1"
_CHOSEN = {  # times as UTC without a zone: DuckDB's zones are an extension that it would download
    "runs": "* replace (make_timestamp(epoch_us(finished_at::timestamptz)) as finished_at), "
    "parse_filename(model_path, true) as model",
    "windows": "*",
    "throughput": "* replace (make_timestamp(epoch_us(measured_at::timestamptz)) as measured_at)",
    "comparisons": "* replace (make_timestamp(epoch_us(finished_at::timestamptz)) as finished_at)",
    "tokens": "*",
    "regressions": "* replace (make_timestamp(epoch_us(finished_at::timestamptz)) as finished_at), "
    + ", ".join(f"metrics['{name}'] as {name}" for name in ("ppl", "kld_mean", "tok_per_s", "fma_share")),
}
_IN_ORDER = {  # of one run
    "runs": [],
    "windows": ['"window"'],
    "throughput": ["measured_at desc"],
    "comparisons": ["finished_at desc", '"bytes" desc'],
    "tokens": ['"window"'],
    "regressions": ["finished_at desc", '"check"', "variant", "data"],
}


@dataclass
class Selection:
    """Which rows and columns, in which order and form.

    Attributes:
        table: runs, windows, throughput, comparisons, tokens or regressions.
        filter: column -> value, list of values, or text with `*` for any characters.
        where: an SQL condition on the columns.
        latest: of several rows of one run, the last complete one only.
        sort: a column, `-column` falling.
        columns: [] for the usual ones, ["*"] for all.
        format: table, csv, markdown or json.
        out: a file for the text, null for standard output.
    """

    table: str = "runs"
    filter: dict[str, Any] = field(default_factory=dict)
    where: str | None = None
    latest: bool = True
    sort: str | None = "-finished_at"
    columns: list[str] = field(default_factory=list)
    limit: int | None = None
    format: str = "table"
    out: str | None = None


@dataclass
class ResultsSettings:
    """Everything the results job can be told."""

    paths: PathsSettings = field(default_factory=PathsSettings)
    results: Selection = field(default_factory=Selection)


@dataclass(frozen=True)
class Found:
    """Rows that were asked for, as text in the form that was asked for.

    `out` is the file that holds the text, None when it is left to the caller.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    text: str
    out: str | None


def results(settings: ResultsSettings) -> Found:
    """Read, choose, sort and write rows of the store.

    Raises:
        SettingsError: an unknown table, format or column; a condition that is not SQL.
        StoreError: there is no such table, or a file in it cannot be read.
        StorageFailure: `results.out` cannot be written.
    """
    s = settings.results
    for key, value, known in (("table", s.table, list(TABLES)), ("format", s.format, FORMATS)):
        if value not in known:
            raise SettingsError(f"results.{key}={value} is not known{nearest(value, known)}")
    if s.limit is not None and s.limit < 1:
        raise SettingsError(f"results.limit={s.limit} is too small; expected 1 or more")
    folder = folder_of(absolute(settings.paths.results))
    with _open(folder, s.table) as store:
        columns, rows = store.select(s)
    text = formatted(columns, rows, s.format)
    if s.out is not None:
        out = Path(absolute(s.out))
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageFailure(
                f"{out}: cannot be written: {error.strerror}", "give another file as results.out"
            ) from error
        return Found(columns, rows, text, str(out))
    return Found(columns, rows, text, None)


def select(folder: Path, query: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a query on the table `runs` of a results folder; [] when there are no runs yet.

    Raises:
        StoreError: a file of the table cannot be read.
    """
    if not _files(folder, "runs"):
        return []
    with _open(folder, "runs") as store:
        return store.rows(query, parameters)


class Store:
    """One table of a results folder in a database of this process's memory."""

    def __init__(self, folder: Path, table: str) -> None:
        import duckdb

        files = _files(folder, table)
        if not files:
            raise StoreError(
                f"{folder}: has no table={table} yet",
                "give the folder of your runs as paths.results=FOLDER",
            )
        self._error = duckdb.Error
        self._db = duckdb.connect(":memory:")
        options = "hive_partitioning=true, union_by_name=true, hive_types_autocast=false"
        try:
            with local_files(files) as here:
                self._db.execute(
                    f"create table {table} as select {_CHOSEN[table]} from read_parquet($files, {options})",
                    {"files": [str(file) for file in here]},
                )
        except (duckdb.Error, OSError) as error:
            self._db.close()
            raise StoreError(
                f"{folder}: table={table} cannot be read: {_first_line(error)}",
                "move the file that is named away: it is no table of Pagemill, or it is broken",
            ) from error
        self._db.execute("set enable_external_access = false")
        self._db.execute("set lock_configuration = true")
        self._table = table

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def rows(self, query: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of a query."""
        found = self._db.execute(query, dict(parameters))
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def select(self, s: Selection) -> tuple[list[str], list[dict[str, Any]]]:
        """Columns and rows of a selection.

        Raises:
            SettingsError: a column that is not there, or a condition that DuckDB cannot read.
        """
        known = [row["column_name"] for row in self.rows(f"describe {self._table}", {})]
        usual = [name for name in _USUAL.get(self._table, known) if name in known]
        columns = known if s.columns == ["*"] else list(s.columns) or usual
        sort = (s.sort or "").lstrip("-+")
        if self._table != "runs" and s.sort == Selection.sort:
            sort = ""
        for name in (*columns, *s.filter, *([sort] if sort else [])):
            if name not in known:
                raise SettingsError(f"there is no column {name} in table={self._table}{nearest(name, known)}")
        parameters: dict[str, Any] = {}
        conditions = [_condition(name, value, parameters) for name, value in s.filter.items()]
        if s.where:
            conditions.append(f"({s.where}\n)")
        chosen = f"select * from {self._table} where {' and '.join(conditions) or 'true'}"
        if s.latest and self._table in _LATEST_OF:
            chosen += (
                f" qualify row_number() over (partition by {_LATEST_OF[self._table]}"
                " order by ok desc, finished_at desc) = 1"
            )
        order = [f'"{sort}" {"desc" if str(s.sort).startswith("-") else "asc"} nulls last'] if sort else []
        order += ["run_key", *_IN_ORDER[self._table]]
        shown = ", ".join(f'"{name}"' for name in columns)
        limit = "" if s.limit is None else f" limit {s.limit}"
        try:
            return columns, self.rows(
                f"select {shown} from ({chosen}) order by {', '.join(order)}{limit}", parameters
            )
        except self._error as error:
            raise SettingsError(
                f"results.where={s.where}: {_first_line(error)}",
                "it is an SQL condition on columns: results.where=\"ppl < 30 and data_name = 'pydoc'\"",
            ) from error


def formatted(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], format: str) -> str:
    """Rows as text: `table` with figures rounded, the other forms with all their digits."""
    if format == "json":
        plain = [{name: _plain(row[name]) for name in columns} for row in rows]
        return json.dumps(plain, indent=1, allow_nan=False) + "\n"
    if format == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_exact(row[name]) for name in columns] for row in rows)
        return text.getvalue()
    cells = [[_rounded(row[name]) for name in columns] for row in rows]
    if format == "markdown":
        lines = [list(columns), ["---:" if _is_figure(rows, name) else "---" for name in columns]]
        lines += [[cell.replace("|", "\\|") for cell in line] for line in cells]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [_is_figure(rows, name) for name in columns]
    return "".join(
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        + "\n"
        for line in [list(columns), *cells]
    )


def _open(folder: Path, table: str) -> Store:
    return Store(folder, table)


def _files(folder: Path, table: str) -> list[Path]:
    """The files of a table.

    Raises:
        StoreError: an object store does not answer.
    """
    try:
        return sorted((folder / _VERSION / f"table={table}").glob(f"run_key=*/{TABLES[table]}"))
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be listed: {error.strerror}", "check paths.results and the permissions"
        ) from error


def _condition(name: str, value: Any, parameters: dict[str, Any]) -> str:
    """An SQL condition, its values as parameters."""
    values = value if isinstance(value, list) else [value]
    alternatives = []
    for item in values:
        if item is None:
            alternatives.append(f'"{name}" is null')
            continue
        key = f"p{len(parameters)}"
        parameters[key] = item
        operator = "glob" if isinstance(item, str) and "*" in item else "="
        alternatives.append(f'"{name}" {operator} ${key}')
    return f"({' or '.join(alternatives) or 'false'})"


def _is_figure(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    known = [row[name] for row in rows if row[name] is not None]
    return bool(known) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in known)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _exact(value: Any) -> str:
    plain = _plain(value)
    if plain is None:
        return ""
    return json.dumps(plain) if isinstance(plain, (bool, list, dict)) else str(plain)


def _rounded(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.5g}"
    if hasattr(value, "strftime"):
        return str(value.strftime("%Y-%m-%d %H:%M"))
    return _exact(value)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
