"""What the tests of tokenizers share: a tokenizer of a vocabulary in memory, golden ids, the texts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from golden.make_tokenizer import NASTY, answers, digest, random_text

from engine import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
MODEL = os.environ.get("PAGEMILL_TEST_MODEL", "")
DATA = os.environ.get("PAGEMILL_TEST_DATA", "")

needs_model = pytest.mark.skipif(not Path(MODEL).is_file(), reason="PAGEMILL_TEST_MODEL names no GGUF file")
needs_data = pytest.mark.skipif(not DATA, reason="PAGEMILL_TEST_DATA is not set")
needs_oracle = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="cyllama (llama.cpp) is not installed"
)


class Strings(list[str]):
    """Stands in for the file's StringArray."""

    def to_list(self) -> list[str]:
        return list(self)


@dataclass
class File:
    """What a tokenizer needs of a GGUF file."""

    metadata: dict[str, Any]
    path: str = "model.gguf"


def make(vocabulary: dict[str, Any], **changed: Any) -> Tokenizer:
    """A tokenizer of a vocabulary with some of `tokenizer.ggml.*` changed; None leaves one out."""
    metadata = vocabulary | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    found = {key: getattr(value, "value", value) for key, value in metadata.items() if value is not None}
    strings = {key: Strings(value) if isinstance(value, list) else value for key, value in found.items()}
    return Tokenizer(File(strings))  # type: ignore[arg-type]


def read_golden(name: str) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads((GOLDEN / f"tokenizer_{name}.json").read_text())
    return golden


def check_golden(name: str, vocabulary: dict[str, Any], pre: str, key: str = "") -> None:
    golden = read_golden(name)[key or pre]
    ours = make(vocabulary, pre=pre)
    for text, expected in zip(NASTY, golden["nasty"], strict=True):
        found = answers(lambda *a, **k: ours.encode(*a, **k).tolist(), text)
        assert hashlib.sha256(found.encode()).hexdigest()[:16] == expected, (text, found)
    assert digest(ours.encode(random_text(20_000, seed=1), add_special=False)) == golden["random"]


def read_wikitext() -> str:
    return (Path(DATA) / "data" / "wiki.test.raw").read_bytes().decode().removesuffix("\n")
