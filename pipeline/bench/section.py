"""The README's section on speed, from the rows of `table=throughput` and the JSON of `jobs.bench_kernels`.

It lies between two comments and is replaced as a whole, so that no figure in it is typed by hand.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.bench.libllama import OPTIONS
from pipeline.bench.players import PEERS
from pipeline.bench.preflight import OURS
from pipeline.bench.report import CASES
from pipeline.errors import SettingsError

BEGIN, END = "<!-- speed: made by `make speed`, do not edit -->", "<!-- speed: end -->"
_INT8 = "pagemill_int8"
_NAMES = {OURS: "Pagemill", _INT8: "with int8", "llama_cpp": "llama.cpp", "ik_llama_cpp": "ik_llama.cpp"}
_WIDTH = 120  # columns of the README
_ENABLED = re.compile(r"(\w+) = 1")  # as llama.cpp tells its features
_FEW, _MANY = (1, 2, 4, 8), 512
Row = Mapping[str, Any]


def latest(results: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """For each of the model files and each test the rows of the command that measured it last.

    Args:
        results: `paths.results` of the throughput job.
        models: absolute paths, in the order that the rows will have.
    """
    import pyarrow.parquet as pq

    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(results.glob("v1/table=throughput/run_key=*/*.parquet")):
        tests: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in pq.read_table(path, partitioning=None).to_pylist():
            tests.setdefault((row["model_path"], row["test"]), []).append(row)
        for key, rows in tests.items():
            if key not in found or rows[0]["measured_at"] > found[key][0]["measured_at"]:
                found[key] = rows
    return [row for model in models for (path, _), rows in found.items() if path == model for row in rows]


def section(rows: Sequence[Row], bench: Row, figure: str, command: str) -> str:
    """The section's Markdown, without its heading and comments."""
    parts = [_machine(rows, bench), *_tables(rows), *_settings(rows), *_kernels(bench), _passes(bench)]
    parts.append(f"![Roofline of the products, by weight type]({figure})")
    parts.append(f"```\n{command}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def replaced(text: str, new: str, name: str) -> str:
    """A README with what lies between its two comments replaced.

    Raises:
        SettingsError: the comments are not there, each once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SettingsError(f"{name}: expected the lines {BEGIN!r} and {END!r}, each once and in this order")
    return text[: text.index(BEGIN)] + f"{BEGIN}\n{new}" + text[text.index(END) :]


def _machine(rows: Sequence[Row], bench: Row) -> str:
    said = f"{bench['cpu']}, {bench['threads']} threads, {bench['measured_at'][:10]}; {CASES[bench['case']]}."
    if not rows:
        return said
    low, high = (f(row["fma_gflops"] for row in rows) for f in (min, max))
    slow, fast = (f(row["read_gb_per_s"] for row in rows) for f in (min, max))
    rounds = min(row["n"] for row in rows)
    return _wrapped(
        f"{said} Medians of {rounds} rounds in which the engines take turns, each in a process of its own on "
        "the same cores, every peer with the fastest of up to three settings. Between the rounds the "
        f"machine's ceiling of float32 multiply-adds was {low:.0f}-{high:.0f} GFLOP/s, reading memory "
        f"{slow:.0f}-{fast:.0f} GB/s: compare within a row."
    )


def _tables(rows: Sequence[Row]) -> list[str]:
    """A table of each test: types down, engines across."""
    parts = []
    for test in dict.fromkeys(row["test"] for row in rows):
        chosen = [row for row in rows if row["test"] == test]
        models = list(dict.fromkeys(row["model_path"] for row in chosen))
        others = [name for name in _NAMES if name != OURS and any(row["engine"] == name for row in chosen)]
        peers, has_int8 = [name for name in others if name != _INT8], _INT8 in others
        headings = ["type", "Pagemill", "of the ceiling", *(_NAMES[name] for name in others)]
        over = ["over the faster"] if len(peers) > 1 else ["ratio"] * len(peers)
        headings += over + [f"int8 {heading}" for heading in over if has_int8]
        lines = []
        for model in models:
            of = {row["engine"]: row for row in chosen if row["model_path"] == model}
            if OURS not in of:
                continue
            speed = {name: row["tok_per_s"] for name, row in of.items()}
            known = [speed[name] for name in peers if name in speed]
            cells = [of[OURS]["type"], f"{speed[OURS]:.1f}", f"{of[OURS]['fma_share']:.0%}"]
            cells += [f"{speed[name]:.1f}" if name in speed else "-" for name in others]
            for name in [OURS, *[_INT8] * has_int8] if peers else []:
                cells.append(f"{speed[name] / max(known):.2f}" if known and name in speed else "-")
            lines.append(cells)
        parts.append(f"{_told(chosen[0])}, tokens/s:\n\n{_table(headings, lines)}")
    return parts


def _told(row: Row) -> str:
    if row["kind"] == "perplexity":
        return f"Perplexity, {row['n_seqs']} windows of {row['n_prompt']} tokens (`{row['test']}`)"
    if row["kind"] == "prompt":
        return f"A prompt of {row['n_prompt']} tokens (`{row['test']}`)"
    many = f"{row['n_seqs']} sequences" if row["n_seqs"] > 1 else "one sequence"
    after = f" after prompts of {row['n_prompt']}" if row["n_prompt"] else ""
    return f"Generating {row['n_generate']} tokens{after}, {many} (`{row['test']}`)"


def _settings(rows: Sequence[Row]) -> list[str]:
    """Versions, CPU features and settings of each engine."""
    lines = []
    for name in _NAMES:
        own = [row for row in rows if row["engine"] == name]
        if not own:
            continue
        options: dict[str, list[str]] = {}
        for row in own:
            known = (OPTIONS if name in PEERS else {}) | json.loads(row["options"])
            said = (
                ", ".join(f"{key}={known[key]}" for key in sorted(known) if known[key] is not None)
                or "defaults"
            )
            tests = options.setdefault(said, [])
            tests += [row["test"]] if row["test"] not in tests else []
        chosen = "; ".join(f"{said} ({', '.join(tests)})" for said, tests in options.items())
        first = own[0]
        features = _ENABLED.findall(first["engine_features"] or "") or [first["engine_features"] or "?"]
        lines.append(
            _wrapped(
                f"- {_NAMES[name]} {first['engine_version']}: KV cache {first['kv_type']}, compiled for "
                f"{' '.join(features)}; {chosen}",
                "  ",
            )
        )
    return ["\n".join(lines)] if lines else []


def _kernels(bench: Row) -> list[str]:
    """A line for each type: products against the limits of the process that they ran in."""
    single = [row for row in bench["few"] if row["threads"] == 1]
    lines = []
    for name in dict.fromkeys(row["type"] for row in single):
        few = {row["n_tokens"]: row for row in single if row["type"] == name}
        many = [row for row in bench["gemm"] if row["type"] == name and row["n_tokens"] == _MANY]
        many = [row for row in many if row["threads"] == 1]
        unpacked = next((row for row in bench["unpacking"] if row["type"] == name), None)
        bytes_ = next((row for row in bench["int8"] if row["type"] == name), None)
        cells = [name, f"{median(row['share'] for row in many):.2f}" if many else "-"]
        cells += [f"{median(row['over_openblas'] for row in many):.2f}" if many else "-"]
        cells += [f"{unpacked['ns_a_weight']:.3f}" if unpacked else "-"]
        cells += [
            f"{few[n]['read_share']:.2f} / {few[n]['fma_share']:.2f}" if n in few else "-" for n in _FEW
        ]
        cells += [f"{bytes_['over_f32']:.2f}" if bytes_ else "-"]
        lines.append(cells)
    headings = ["type", "512 tokens", "over OpenBLAS", "decoding, ns a weight"]
    headings += [f"{n} token{'s' if n > 1 else ''}" for n in _FEW] + ["int8"]
    said = _wrapped(
        "Products on one thread, decoding included, as shares of what the same process could do just before "
        "and after: of float32 multiply-adds, and for a few tokens of reading memory / of multiply-adds. "
        "OpenBLAS multiplies float32 weights; `int8` rounds 480 tokens to 8 bits:"
    )
    return [f"{said}\n\n{_table(headings, lines)}"]


def _passes(bench: Row) -> str:
    """Shares of the whole forward pass."""
    done = bench["passes"]
    if not done:
        return ""
    names = [item["item"] for item in done[0]["items"]]
    headings = ["of the time of all threads", *(f"windows of {each['window']:,}" for each in done)]
    lines = [[name, *(f"{each['items'][i]['share']:.1%}" for each in done)] for i, name in enumerate(names)]
    model = bench["model"].removesuffix(".gguf")
    return f"The whole forward pass, {model}, {done[0]['threads']} threads:\n\n{_table(headings, lines)}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rules = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows))


def _wrapped(text: str, indent: str = "") -> str:
    """Prose in the README's width."""
    return textwrap.fill(
        text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
