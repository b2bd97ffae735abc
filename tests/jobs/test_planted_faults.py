"""Faults planted into a model, its text, its windows and the engine: `pagemill regression` names each.

Every run is a process of its own, as a user's, with a suite and a baseline in files. A fault of the engine is
planted into a copy of the sources, which has its kernels compiled anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
import pytest

from pipeline import provenance
from pipeline.regression import record
from pipeline.regression.outcome import Outcome, WindowSums
from tests.conftest import Answer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
SUITE = """\
name: planted
checks:
  text:
    job: perplexity
    set: {model.path: m.gguf, data.path: t.txt, protocol: {window: 128, limit: 16}}
    limits:
      nll_sha256: {equal: true}
      model_sha256: {equal: true}
      ppl: {rise: 0.002}
      ln_ppl: {effect: 0.005, confidence: 0.99}
    trace: 2
  pair:
    job: compare
    set: {base.path: m.gguf, variants: [v.gguf], data.path: t.txt, protocol: {window: 128, limit: 16}}
    limits:
      model_sha256: {equal: true}
      kld_sha256: {equal: true}
      kld_mean: {effect: 0.002, confidence: 0.99}
      ln_ppl: {effect: 0.005, confidence: 0.99}
"""
SPEED = """\
name: speed
checks:
  speed:
    job: throughput
    set: {model.path: m.gguf, bench: {kinds: [perplexity], windows: 2}}
    limits: {fma_share: {fall: 0.15}}
"""
ONLY_TEXT, ONLY_PAIR = "~suite.checks.pair", "~suite.checks.text"
TENSOR = "blk.14.attn_output.weight"
Planted = tuple[str, str, str]
"""A file of the sources, what stands in it once, and what is put there instead."""
SLOWER: Planted = (
    "engine/kernels/product.py",
    "    for k0 in range(0, depth, DEPTH):\n        steps",
    """\
    for row in range(0, n_strips * STRIP, MR):  # two fifths of the depth once more, to be overwritten
        a = packed + (row // STRIP * depth * STRIP + row % STRIP) * 4
        tile(a, STRIP, x, NR, out + row * NR * 4, NR, depth * 2 // 5, 0, n_vectors)
    for k0 in range(0, depth, DEPTH):
        steps""",
)
OTHER_ORDER: Planted = (
    "engine/kernels/product.py",
    "return gate / (_ONE + exp32(-gate)) * up",
    "return gate * (up / (_ONE + exp32(-gate)))",
)


def command(folder: Path, job: str, *words: str, sources: Path = ROOT) -> Answer:
    """A command line in that folder, of these sources; copies say of which commit they are."""
    known = {"PYTHONPATH": str(sources), "PAGEMILL_GIT_SHA": provenance.git_sha() or ""}
    if sources != ROOT:
        known["NUMBA_CACHE_DIR"] = str(sources / "kernels")
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *words],
        cwd=folder,
        env=os.environ | known,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    return Answer(done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr)


def regression(folder: Path, *words: str, suite: str = "suite.yaml", sources: Path = ROOT) -> Answer:
    """The suite beside its baseline, without MLflow."""
    given = (f"suite={suite}", "baseline=b.parquet", "cluster=inline", "tracking=none",
             "paths.results=results", "paths.cache=cache")  # fmt: skip
    return command(folder, "regression", *given, *words, sources=sources)


def quantize(folder: Path, kind: str) -> None:
    """Make v.gguf of m.gguf, over one that is there."""
    given = ("model.path=m.gguf", f"quantize.type={kind}", "quantize.out=v.gguf", "quantize.overwrite=true",
             "quantize.allow_requantize=true", "paths.results=results", "paths.cache=cache")  # fmt: skip
    done = command(folder, "quantize", *given)
    assert done.exit_code == 0, done.stderr


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A folder with models, text, suites, and a baseline of `SUITE`."""
    folder = tmp_path_factory.mktemp("promoted")
    (folder / "m.gguf").symlink_to(smollm2.resolve())
    quantize(folder, "Q8_0")
    (folder / "t.txt").write_text("\n".join(topics.values())[:16_000])
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "speed.yaml").write_text(SPEED)
    made = regression(folder, "action=promote")
    assert (made.exit_code, made.line["verdict"]) == (0, "promoted"), made.stderr
    return folder


@pytest.fixture
def home(promoted: Path, tmp_path: Path) -> Path:
    """The same, for one fault."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("m.gguf", "v.gguf"):
        (folder / name).symlink_to((promoted / name).resolve())
    for name in ("t.txt", "suite.yaml", "speed.yaml", "b.parquet"):
        shutil.copy(promoted / name, folder)
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> Callable[[Planted], Path]:
    """Makes a copy of the sources with one place of a file changed."""

    def copy(planted: Planted) -> Path:
        folder = tmp_path / "sources"
        for name in ("engine", "pipeline", "jobs", "conf"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        file, before, after = planted
        text = (folder / file).read_text()
        assert text.count(before) == 1, f"{file} has changed: plant the fault elsewhere"
        (folder / file).write_text(text.replace(before, after))
        return folder

    return copy


def own_copy(model: Path) -> None:
    """Put a file in place of the link."""
    target = model.resolve()
    model.unlink()
    shutil.copyfile(target, model)


def swap(model: Path, one: bytes, other: bytes) -> None:
    """Exchange two byte strings of one length, each of which the metadata has once; or write the other."""
    own_copy(model)
    with model.open("r+b") as file:
        head = file.read(2 << 20)
        places = {head.find(each): each for each in (one, other) if each in head}
        assert all(head.count(each) == 1 for each in places.values())
        for at, each in places.items():
            file.seek(at)
            file.write(other if each == one else one)


def string(text: str) -> bytes:
    """As GGUF has it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gates(answer: Answer, check: str) -> dict[str, dict[str, Any]]:
    """By metric, of a check."""
    return {gate["metric"]: gate for gate in answer.line["gates"] if gate["name"] == check}


def verdicts(answer: Answer, check: str) -> dict[str, bool | None]:
    return {metric: gate["passed"] for metric, gate in gates(answer, check).items()}


def blamed(answer: Answer) -> dict[str, Any]:
    """The one culprit of a red suite, whose sentence is also the error's."""
    assert (answer.exit_code, answer.line["verdict"]) == (1, "regression"), answer.stderr
    culprit: dict[str, Any]
    [culprit] = answer.line["culprits"]
    assert culprit == answer.line["culprit"]
    assert answer.line["error"]["type"] == "Regression"
    assert culprit["sentence"] in answer.line["error"]["message"]
    return culprit


def refused(answer: Answer, folder: Path, *, before_work: bool = True) -> str:
    """The message of a suite that asks something else than its baseline."""
    assert (answer.exit_code, answer.line["error"]["type"]) == (2, "OtherMeasure"), answer.stderr
    assert not {"verdict", "gates", "culprit"} & answer.line.keys(), "nothing is judged"
    assert (folder / "results/v1").exists() != before_work
    return str(answer.line["error"]["message"])


def test_what_did_not_change_is_green(home: Path) -> None:
    answer = regression(home)
    assert (answer.exit_code, answer.line["verdict"]) == (0, "passed"), answer.stderr
    assert len(answer.line["gates"]) == 8
    assert all(gate["passed"] for gate in answer.line["gates"])
    assert answer.line["culprits"] == []


def test_one_bit_of_one_weight(home: Path) -> None:
    model = home / "m.gguf"
    own_copy(model)
    [tensor] = [each for each in gguf.GGUFReader(model).tensors if each.name == TENSOR]
    assert tensor.tensor_type.name == "Q4_1"
    with model.open("r+b") as file:
        place = tensor.data_offset + 20 * 1000 + 4  # block 1000: two half floats, then nibbles
        file.seek(place)
        [nibbles] = file.read(1)
        file.seek(place)
        file.write(bytes([nibbles ^ 1]))
    answer = regression(home, ONLY_TEXT)
    culprit = blamed(answer)
    verdict = verdicts(answer, "text")
    assert verdict == {"nll_sha256": None, "model_sha256": False, "ppl": True, "ln_ppl": True}
    assert "this is another: model_sha256" in gates(answer, "text")["nll_sha256"]["note"]
    assert culprit["metrics"] == ["model_sha256"]
    assert "model_sha256" in culprit["differs"]
    assert culprit["tensors"] == [TENSOR]
    assert (culprit["window"], culprit["layer"]) == (0, TENSOR.removesuffix(".weight"))
    assert f"the model file is another one: 1 of 272 tensors differs, {TENSOR};" in culprit["sentence"]
    assert "first parts at blk.14.attn_output in window 0" in culprit["sentence"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("smollm", "falcon"), ("\u0120the", "\u0120and")],  # the pre-tokenizer; two words of the vocabulary
)
def test_another_tokenizer(home: Path, one: str, other: str) -> None:
    swap(home / "m.gguf", string(one), string(other))
    message = refused(regression(home, ONLY_TEXT), home)
    assert re.search(
        r"text: tokens_sha256 \w+\.\.\. in the baseline, \w+\.\.\. now: another tokenizer", message
    )
    assert "data_sha256" not in message


def test_a_window_less_is_asked(home: Path) -> None:
    answer = regression(home, "suite.checks.text.set.protocol.limit=15")
    message = refused(answer, home)
    assert "text: protocol_limit 16 in the baseline, 15 now: another part of the text" in message


def test_a_window_that_the_baseline_lost(home: Path) -> None:
    run, measured = record.read(home / "b.parquet")
    [text] = [each for each in measured if each.check == "text"]
    kept = np.arange(16) != 5
    columns: dict[str, Any] = {
        name: None if rows is None else rows[kept] for name, rows in vars(text.windows).items()
    }
    lost = replace(text, windows=WindowSums(**columns))
    (home / "b.parquet").unlink()
    outcome = Outcome(run["suite"], run["run_key"], run["verdict"], run["checks"], [lost], [], [], None, run)
    record.write(home, outcome, "b")
    message = refused(regression(home, ONLY_TEXT), home, before_work=False)
    assert "text: n_windows 15 in the baseline, 16 now: window 5 is new" in message


def test_one_byte_of_the_text(home: Path) -> None:
    text = bytearray((home / "t.txt").read_bytes())
    assert text[15_000] != ord("#")
    text[15_000] = ord("#")
    (home / "t.txt").write_bytes(text)
    message = refused(regression(home), home)
    for check in ("text", "pair"):
        assert re.search(
            rf"{check}: data_sha256 \w+\.\.\. in the baseline, \w+\.\.\. now: the text is", message
        )


def test_a_variant_quantized_worse(home: Path) -> None:
    (home / "v.gguf").unlink()
    quantize(home, "Q4_0")
    answer = regression(home, ONLY_PAIR)
    culprit = blamed(answer)
    red = [metric for metric, passed in verdicts(answer, "pair").items() if passed is False]
    assert {"model_sha256", "kld_mean"} <= set(red)
    assert verdicts(answer, "pair")["kld_sha256"] is None
    assert culprit["variant"] == "v"
    assert culprit["metrics"] == red
    assert "model_sha256" in culprit["differs"]
    assert "blk.0.attn_q.weight" in culprit["tensors"]
    assert culprit["layer"] == "blk.0.attn_v"
    assert re.match(r"pair v text: kld_mean is 0\.\d+ and was 0\.\d+ \(\+", culprit["sentence"])
    assert re.search(r"the model file is another one: \d+ of 272 tensors differ, ", culprit["sentence"])


def test_another_order_of_operations_without_another_numerics(
    home: Path, sources: Callable[[Planted], Path]
) -> None:
    answer = regression(home, ONLY_TEXT, sources=sources(OTHER_ORDER))
    culprit = blamed(answer)
    verdict = verdicts(answer, "text")
    assert verdict == {"nll_sha256": False, "model_sha256": True, "ppl": True, "ln_ppl": True}
    note = gates(answer, "text")["nll_sha256"]["note"]
    assert note == "bits of the same subject changed although engine.NUMERICS was not raised"
    assert list(culprit["differs"]) == ["engine_digest"]
    assert culprit["tensors"] == []
    assert (culprit["window"], culprit["layer"]) == (0, "blk.0.ffn_up")
    assert "the engine's sources are others, engine.NUMERICS was not raised" in culprit["sentence"]
    assert "first parts at blk.0.ffn_up in window 0" in culprit["sentence"]


@pytest.mark.alone
def test_a_slower_product(home: Path, sources: Callable[[Planted], Path]) -> None:
    (home / "b.parquet").unlink()
    made = regression(home, "action=promote", suite="speed.yaml")
    assert made.exit_code == 0, made.stderr
    green = regression(home, suite="speed.yaml")
    assert (green.exit_code, green.line["verdict"]) == (0, "passed"), green.line["gates"]
    answer = regression(home, suite="speed.yaml", sources=sources(SLOWER))
    culprit = blamed(answer)
    assert culprit["metrics"] == ["fma_share"]
    assert (culprit["name"], culprit["variant"], culprit["data"]) == ("speed", "m", "ppl512")
    said = re.match(
        r"speed m ppl512: fma_share is 0\.\d+ and was 0\.\d+ \(-(\d+) %, limit >= 0\.85 x baseline\), "
        r"[\d.]+ tokens a second and [\d.]+ then \(-(\d+) %\); the machine's ceiling of arithmetic did not "
        r"move(?: by more than between rounds)?; the engine's sources are others; the same machine",
        culprit["sentence"],
    )
    assert said is not None, culprit["sentence"]
    assert all(16 <= int(share) <= 40 for share in said.groups())
