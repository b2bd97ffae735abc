"""What a comparison can be told, and what of it is refused before a file is opened."""

import pytest

from pipeline.compare.models import named
from pipeline.compare.settings import CompareSettings, Limit, StopSettings
from pipeline.errors import SettingsError
from pipeline.settings import ClusterSettings, DataSettings, EngineSettings, ModelSettings, PathsSettings


def settings(**groups):
    return CompareSettings(
        **{
            "base": ModelSettings("base.gguf"),
            "variants": ["Q8_0"],
            "data": DataSettings(path="t.txt"),
            "paths": PathsSettings("results", "cache"),
            **groups,
        }
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"variants": []}, "variants is empty"),
        ({"variants": ["Q8_0", " "]}, "variants[1] is empty"),
        ({"limits": {"kld_men": 1}}, "limits.kld_men is not known; did you mean kld_mean?"),
        ({"limits": {"kld_mean": "about 1"}}, "limits.kld_mean=about 1 is no limit"),
        ({"limits": {"kld_mean": True}}, "limits.kld_mean=True is no limit"),
        ({"stop": StopSettings("decide")}, "stop.name=decide is not known; did you mean decided?"),
        ({"cluster": ClusterSettings(numa="mirrors")}, "cluster.numa=mirrors is not known; did you mean"),
        ({"cluster": ClusterSettings(workers=0)}, "cluster.workers=0 is too small"),
        (
            {"cluster": ClusterSettings(numa="mirror"), "engine": EngineSettings(load="copy")},
            "cluster.numa=mirror and engine.load=copy",
        ),
        ({"stop": StopSettings("decided", 1.5)}, "stop.alpha=1.5 is no error rate"),
        ({"data": DataSettings(path="t.jsonl", format="jsonl", weight="w")}, "data.weight=w"),
        ({"base": ModelSettings()}, "base.path is not set"),
        ({"engine": EngineSettings(kv="f8")}, "engine.kv=f8 is not known"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(groups, message):
    with pytest.raises(SettingsError) as caught:
        settings(**groups).validate()
    assert message in str(caught.value)
    assert "pagemill compare --help" in caught.value.hint


def test_all_problems_are_told_at_once():
    with pytest.raises(SettingsError, match="2 settings cannot be used") as caught:
        settings(variants=[], limits={"x": 1}).validate()
    assert "variants is empty" in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "told", "kept", "broken"),
    [
        ("kld_mean", 0.05, 0.05, 0.051),
        ("kld_mean", "<0.05", 0.049, 0.05),
        ("same_top", 0.9, 0.9, 0.89),
        ("same_top", ">= .9", 0.95, 0.5),
        ("ln_ratio", "> -1e-3", 0.0, -0.001),
    ],
)
def test_a_number_is_the_worst_value_allowed(metric, told, kept, broken):
    limit = Limit.read(metric, told)
    assert limit.is_kept(kept)
    assert not limit.is_kept(broken)
    assert not limit.is_kept(None), "what is not known keeps nothing"
    assert not limit.is_kept(float("nan"))


def test_names_are_as_long_as_it_takes():
    paths = ["/m/a/low.gguf", "/m/b/low.gguf", "/m/b/high.gguf"]
    assert named(paths) == ["a/low", "b/low", "high"]
    assert named(["/m/x.Q8_0.gguf"]) == ["x.Q8_0"]
