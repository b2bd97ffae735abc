"""Models of 300 tokens, and the base's 16-bit logits, for tests of comparisons with such files."""

import shutil
from pathlib import Path

import pytest

from pipeline.compare import compare
from tests.pipeline.foreign_logits import settings_in, write_models


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    """A page takes a second, and none of these tests looks at it."""
    monkeypatch.setattr(
        "pipeline.compare.report.write", lambda summary, pairs, folder, tokenizer: folder / "x.html"
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The models, and the base's file as we write it."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    compare(settings_in(folder)(out="b.logits"))
    return folder


@pytest.fixture
def make(tmp_path, models):
    """Settings of comparisons of copies of them."""
    for path in [*models.glob("*.gguf"), *models.glob("*.txt")]:
        shutil.copy(path, tmp_path)
    return settings_in(tmp_path)


@pytest.fixture
def written(models, make, tmp_path):
    """The base's file beside them."""
    return Path(shutil.copy(models / "b.logits", tmp_path))
