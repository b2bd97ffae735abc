"""conf/ is data that always composes, and says nothing that the schema does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import conf
from jobs import compare, perplexity, regression, schema, suites, usage
from pipeline.compare.settings import CompareSettings
from pipeline.regression.settings import RegressionSettings
from pipeline.settings import PerplexitySettings

ROOT = Path(conf.__path__[0])
CHOICES = [(group, option) for group, options in schema.groups().items() for option in options]


def composed(*words: str, job: str = "perplexity") -> DictConfig:
    assert (perplexity.SCHEMA, compare.SCHEMA) == (PerplexitySettings, CompareSettings)
    with initialize_config_module("conf", version_base="1.3"):
        return compose(job, overrides=list(words))


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_config_composes(group: str, option: str) -> None:
    if usage.job_of(ROOT / group / f"{option}.yaml") == "compare":
        words = ["base.path=m.gguf", "data.path=t.txt", "variants=[Q8_0]"]
        settings = OmegaConf.to_object(composed(f"{group}={option}", *words, job="compare"))
        assert isinstance(settings, CompareSettings)
    elif group == "suite":
        assert regression.SCHEMA is RegressionSettings
        with initialize_config_module("conf", version_base="1.3"):
            settings = OmegaConf.to_object(compose("regression", overrides=[f"suite={option}"]))
            assert all(check.limits for check in suites.checks(settings))
    else:
        settings = OmegaConf.to_object(composed(f"{group}={option}", "model.path=m.gguf", "data.path=t.txt"))
        assert isinstance(settings, PerplexitySettings)
    settings.tracking.uri = settings.tracking.uri or "http://127.0.0.1:5000"
    settings.validate()


def test_the_default_choices_are_the_schemas_defaults() -> None:
    assert composed() == OmegaConf.structured(PerplexitySettings)
    assert composed(job="compare") == OmegaConf.structured(CompareSettings)
    assert composed(job="regression") == OmegaConf.structured(RegressionSettings)


@pytest.mark.parametrize("group", ["data", "cluster", "tracking", "protocol"])
def test_switching_a_choice_leaves_nothing_of_the_one_before(group: str) -> None:
    for option in schema.groups()[group]:
        once = composed(f"{group}={option}")
        own = {key for key in OmegaConf.load(ROOT / group / f"{option}.yaml")}
        defaults = OmegaConf.structured(PerplexitySettings)[group]
        for key in set(once[group]) - own:
            assert once[group]._get_node(key) == defaults._get_node(key)


def test_wikitext2_is_pinned_to_the_official_bytes() -> None:
    digest = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    assert composed("data=wikitext2").data.sha256 == digest


def test_the_demo_is_six_windows_for_two_workers() -> None:
    cfg = composed("experiment=demo")
    assert (cfg.protocol.limit, cfg.protocol.window, cfg.cluster.workers) == (6, 512, 2)
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.yaml")), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_opens_with_the_command_that_uses_it(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith(("# pagemill ", "# make model && pagemill "))
    if file.parent != ROOT:
        assert lines[1].startswith("# "), "the second line says what it is; --help shows it"
        assert len(lines[1]) < 80


def test_help_names_every_choice_and_every_key() -> None:
    pages = {job: usage.text(job) for job in ("perplexity", "compare", "regression")}
    for group, option in CHOICES:
        told = [job for job, page in pages.items() if f" {option} " in page]
        assert usage.job_of(ROOT / group / f"{option}.yaml") in told
    schemas = {"perplexity": PerplexitySettings, "compare": CompareSettings, "regression": RegressionSettings}
    for job, settings in schemas.items():
        for key in schema.keys(settings):
            assert f"  {key}=" in pages[job]
        assert max(map(len, pages[job].splitlines())) <= 110
