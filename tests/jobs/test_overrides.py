"""Any path that a shell hands over arrives in the settings as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from jobs import schema
from jobs.overrides import is_path_key, literal, quote_paths
from pipeline.settings import ModelSettings, PerplexitySettings

NASTY = [
    "a b.gguf",
    "a=b.gguf",
    "a,b.gguf",
    "(copy) [1] {2}.gguf",
    "it's.gguf",
    'say "hi".gguf',
    "back\\slash\\",
    "$HOME.gguf",
    "${oc.env:HOME}.gguf",
    "\\${x}",
    "#1 100% *?.gguf",
    "модель-模型.gguf",
    " leading and trailing ",
    "1e5",
    "true",
    "+plus",
    "a~b",
    "http://x/y",
    "two\nlines",
    "'half",
]

paths = st.text(
    st.one_of(st.sampled_from("'\"\\${}()[],=~ :@#%?*\n\t|"), st.characters(exclude_categories=["Cs"])),
    min_size=1,
).filter(lambda text: text != "???")  # OmegaConf's word for a value that is missing


def evaluated(value: str) -> str:
    """What the settings hold once Hydra's parser and OmegaConf's interpolation have read it."""
    node = OmegaConf.structured(ModelSettings)
    node.path = OverridesParser.create().parse_override(f"model.path={value}").value()
    settings = OmegaConf.to_object(node)
    assert isinstance(settings, ModelSettings)
    return settings.path


@given(paths)
@example("\\'${")
@example("/a\\\\${b}\\")
@example("${x}'\\")
def test_a_literal_evaluates_to_itself(text: str) -> None:
    assert evaluated(literal(text)) == text


@pytest.mark.parametrize("path", NASTY)
def test_a_path_reaches_the_pipeline_as_typed(path, pagemill, pipeline) -> None:
    answer = pagemill("perplexity", f"model.path={path}", f"data.path={path}x", f"paths.results={path}y")
    assert answer.exit_code == 0, answer.stderr
    (settings,) = pipeline.seen
    assert (settings.model.path, settings.data.path, settings.paths.results) == (path, f"{path}x", f"{path}y")


def test_a_path_that_no_codec_reads_is_kept() -> None:
    text = b"caf\xe9.gguf".decode(errors="surrogateescape")  # as sys.argv brings it
    assert evaluated(literal(text)) == text


def test_the_home_folder_is_expanded_at_the_start_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert quote_paths(["model.path=~/a b.gguf"]) == ["model.path='/home/me/a b.gguf'"]
    assert quote_paths(["model.path=a/~/b"]) == ["model.path='a/~/b'"]
    assert quote_paths(["paths.cache=~"]) == ["paths.cache='/home/me'"]


@pytest.mark.parametrize(
    "value", ["", "???", "null", "NULL", "'a b'", '"a b"', r"'it\'s'", "'${paths.results}/x'"]
)
def test_hydras_own_words_and_quotes_are_left_alone(value: str) -> None:
    assert quote_paths([f"model.path={value}"]) == [f"model.path={value}"]


@pytest.mark.parametrize(
    "word",
    ["protocol.window=256", "hydra.run.dir=${paths.results}", "data=text", "~model", "--cfg", "path=x", "x"],
)
def test_words_that_are_no_paths_are_left_alone(word: str) -> None:
    assert quote_paths([word]) == [word]


def test_added_and_forced_keys_are_quoted_too() -> None:
    assert quote_paths(["+model.path=a b", "++data.path=c,d"]) == ["+model.path='a b'", "++data.path='c,d'"]


def test_every_path_of_the_schema_is_recognized() -> None:
    found = {key for key in schema.keys(PerplexitySettings) if is_path_key(key)}
    assert found == {"model.path", "data.path", "paths.results", "paths.cache"}


def test_multirun_sweeps_over_paths_but_not_inside_one(tmp_path: Path) -> None:
    assert quote_paths(["-m", "model.path=a b,c"]) == ["-m", "model.path='a b','c'"]
    assert quote_paths(["-m", "model.path=choice(a,b)"]) == ["-m", "model.path=choice(a,b)"]
    both = tmp_path / "a,b"
    both.touch()
    assert quote_paths(["-m", f"model.path={both}"]) == ["-m", f"model.path='{both}'"]
