"""The section on speed and its figure: made from rows and a bench, and put where they belong, or refused."""

from __future__ import annotations

import datetime
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine.quants import decoder
from jobs import speed
from pipeline import tables
from pipeline.bench import requantize, roofline, section
from pipeline.errors import SettingsError
from tests.make_gguf import tiny_llama

COMMENTS = f"before\n{section.BEGIN}\nold\n{section.END}\nafter\n"


def row(engine_name: str, model: str, **values: Any) -> dict[str, Any]:
    """A row of `table=throughput`, as far as the section reads it."""
    known = {
        "engine": engine_name, "engine_version": "1.2", "kind": "perplexity", "test": "ppl512",
        "type": "Q4_1", "n_prompt": 512, "n_generate": 0, "n_seqs": 4, "threads": 2, "n": 5,
        "tok_per_s": 600.0,
        "fma_gflops": 210.0, "fma_share": 0.75, "read_gb_per_s": 25.0, "kv_type": "f16", "options": "{}",
        "engine_features": "avx2 fma", "model_path": f"/models/{model}.gguf",
    }  # fmt: skip
    return known | values


def bench() -> dict[str, Any]:
    """What `jobs.bench_kernels` says, two types of it."""
    few = [
        {
            "type": name, "n_tokens": n, "threads": 1, "gflops": 20.0 * n**0.5, "ceiling": 100.0,
            "read_gb_per_s": 25.0, "read_share": 0.4, "fma_share": 0.2 * n**0.5,
            "flop_per_byte": n * per_byte,
        }
        for name, per_byte in (("Q4_1", 3.2), ("F32", 0.5))
        for n in (1, 2, 4, 8)
    ]  # fmt: skip
    gemm = [
        {
            "type": name, "n_tokens": n, "threads": threads, "gflops": 95.0, "ceiling": 100.0, "share": 0.95,
            "over_openblas": 1.1, "flop_per_byte": n * 2.0,
        }
        for name in ("Q4_1", "F32") for n in (512, 2048) for threads in (1, 2)
    ]  # fmt: skip
    items = [{"item": "products", "share": 0.75}, {"item": "other", "share": 0.012}]
    done = {"window": 512, "n_tokens": 4096, "threads": 2, "fma_share": 0.8, "flop_per_byte": 9000.0}
    return {
        "cpu": "A & B <CPU>", "case": "vnni", "threads": 2, "measured_at": "2026-11-22T10:00:00+00:00",
        "model": "tiny.gguf", "few": few, "gemm": gemm, "passes": [done | {"items": items}],
        "unpacking": [{"type": "Q4_1", "ns_a_weight": 0.06}],
        "int8": [{"type": "Q4_1", "over_f32": 2.5, "flop_per_byte": 1500.0}],
    }  # fmt: skip


def test_a_section_compares_each_type_with_the_faster_peer() -> None:
    rows = [
        row("pagemill", "a"),
        row(
            "llama_cpp",
            "a",
            tok_per_s=200.0,
            engine_features="AVX2 = 1 | AMX = 0 | FMA = 1",
            options='{"ubatch":2048,"flash_attention":true}',
        ),
        row("ik_llama_cpp", "a", tok_per_s=400.0),
        row("pagemill", "b", type="F32", tok_per_s=500.0, fma_gflops=190.0),
        row("llama_cpp", "b", type="F32", tok_per_s=250.0),
        row("pagemill", "a", test="tg32", kind="generate", n_prompt=0, n_generate=32, n_seqs=1),
    ]
    text = section.section(rows, bench(), "notebooks/roofline.svg", "make speed")
    assert "| Q4_1 | 600.0 | 75% | 200.0 | 400.0 | 1.50 |" in text
    assert "| F32 | 500.0 | 75% | 250.0 | - | 2.00 |" in text
    assert "| Q4_1 | 600.0 | 75% |\n" in text, "a test without a peer"
    assert "190-210 GFLOP/s" in text
    flat = " ".join(text.split())
    assert "llama.cpp 1.2: KV cache f16, compiled for AVX2 FMA; batch=2048, flash_attention=True" in flat
    assert "ubatch=2048 (ppl512); batch=2048" in flat, "several settings, each with its tests"
    assert "Pagemill 1.2: KV cache f16, compiled for avx2 fma; defaults (ppl512, tg32)" in flat
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    assert (
        "| Q4_1 | 0.95 | 1.10 | 0.060 | 0.40 / 0.20 | 0.40 / 0.28 | 0.40 / 0.40 | 0.40 / 0.57 | 2.50 |"
        in text
    )
    assert "| F32 | 0.95 | 1.10 | - |" in text
    assert "| other | 1.2% |" in text
    assert "VNNI" in text
    assert "![Roofline of the products, by weight type](notebooks/roofline.svg)" in text
    widths = [
        [line.count("|") for line in part.splitlines()] for part in text.split("\n\n") if part[0] == "|"
    ]
    assert widths
    assert all(len(set(counts)) == 1 for counts in widths)


def test_only_what_lies_between_the_comments_is_replaced() -> None:
    once = section.replaced(COMMENTS, "new\n", "README.md")
    assert once == f"before\n{section.BEGIN}\nnew\n{section.END}\nafter\n"
    assert section.replaced(once, "new\n", "README.md") == once


@pytest.mark.parametrize(
    "text", ["", section.BEGIN, COMMENTS + section.END, f"{section.END}\n{section.BEGIN}\n"]
)
def test_a_readme_without_its_comments_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"README\.md: expected the lines"):
        section.replaced(text, "new", "README.md")


def test_of_several_commands_the_last_one_counts_for_each_test(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    def write(name: str, day: int, **values: Any) -> None:
        rows = [row("pagemill", "a", **values), row("llama_cpp", "a", **values)]
        when = datetime.datetime(2026, 11, day, tzinfo=datetime.UTC)
        folder = tmp_path / "v1" / "table=throughput" / f"run_key={name}"
        folder.mkdir(parents=True, exist_ok=True)
        table = tables.table([each | {"measured_at": when} for each in rows], tables.THROUGHPUT_SCHEMA)
        pq.write_table(table, folder / f"run-{day}.parquet")

    write("x", 3, tok_per_s=3.0)
    write("x", 1, tok_per_s=1.0)
    write("y", 2, tok_per_s=2.0, test="tg32")
    write("z", 4, model_path="/models/other.gguf")
    found = section.latest(tmp_path, ["/models/a.gguf"])
    assert [(each["test"], each["engine"], each["tok_per_s"]) for each in found] == [
        ("ppl512", "pagemill", 3.0), ("ppl512", "llama_cpp", 3.0),
        ("tg32", "pagemill", 2.0), ("tg32", "llama_cpp", 2.0),
    ]  # fmt: skip
    assert section.latest(tmp_path / "nothing", ["/models/a.gguf"]) == []


def test_points_stand_at_their_share_of_the_ceiling_beside_them() -> None:
    measured = bench()
    measured["few"][0] |= {"gflops": 10.0, "ceiling": 50.0, "read_gb_per_s": 12.5}  # the machine was busy
    assert roofline.roofs(measured) == (100.0, 25.0)
    assert roofline.lines(measured)["Q4_1"][0] == (3.2, 20.0)
    assert [len(points) for points in roofline.lines(measured).values()] == [5, 5]
    assert roofline.passes(measured) == {"whole pass, windows of 512": (9000.0, 80.0)}
    assert roofline.bytes_products(measured) == {"Q4_1": (1500.0, 250.0)}


def test_a_figure_is_the_same_svg_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="extra `report` is not installed")
    for name in ("a.svg", "b.svg"):
        roofline.draw(bench(), tmp_path / "new" / name)
    first = (tmp_path / "new" / "a.svg").read_bytes()
    assert first == (tmp_path / "new" / "b.svg").read_bytes()
    root = ElementTree.fromstring(first)
    texts = " ".join("".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text"))
    for expected in ("Q4_1", "F32", "100 GFLOP/s", "25.0 GB/s", "windows of 512", "A & B <CPU>"):
        assert expected in texts
    assert len(first) < 200_000


def test_a_model_is_written_in_other_types(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "tiny.Q8_0.gguf", type_name="Q8_0", **{"general.file_type": 7})
    made = requantize.requantized(source, tmp_path / "made", ["Q8_0", "F32", "Q4_0"])
    assert [path.name for path in made] == ["tiny.Q8_0.gguf", "tiny.F32.gguf", "tiny.Q4_0.gguf"]
    with engine.open(source) as old, engine.open(made[1]) as new, engine.open(made[2]) as small:
        weight, wide = (file.tensors["blk.0.ffn_up.weight"] for file in (old, new))
        decoded = np.empty(wide.n_bytes // 4, np.float32)
        decoder("Q8_0")(weight.data, 0, decoded.size // 32, decoded)
        assert wide.data.view(np.float32).tolist() == decoded.tolist()
        assert small.tensors["blk.0.ffn_up.weight"].type.name == "Q4_0"
        del weight, wide
    before = made[1].stat().st_mtime_ns
    assert requantize.requantized(source, tmp_path / "made", ["F32"])[0].stat().st_mtime_ns == before
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["tiny.F32.gguf", "tiny.Q4_0.gguf"]


def test_types_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "tiny.gguf")
    with pytest.raises(SettingsError, match="Q4_KM"):
        requantize.requantized(source, tmp_path / "made", ["Q8_0", "Q4_KM"])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere.gguf"], "no model file at nowhere.gguf"), ([__file__, "x"], "x: expected KEY")],
)
def test_a_command_line_that_cannot_be_meant_is_refused(words, said, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        speed.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_readme_is_refused_before_an_hour_is_spent(tmp_path: Path, capsys) -> None:
    model, readme = tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "README.md"
    readme.write_text("no comments")
    assert speed.main([str(model), "--readme", str(readme)]) == 2
    assert "expected the lines" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".gguf"] == ["README.md"]
