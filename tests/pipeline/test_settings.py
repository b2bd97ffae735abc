"""Settings: all problems told at once, with the nearest valid name; the schema takes Hydra's overrides."""

import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from pipeline.errors import SettingsError
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)


def settings(**groups):
    return PerplexitySettings(
        **{"model": ModelSettings("m.gguf"), "data": DataSettings(path="t.txt"), **groups}
    )


def test_defaults_need_only_a_model_and_a_text():
    assert settings().validate() == []
    with pytest.raises(SettingsError, match=r"(?s)model\.path is not set.*data\.path is not set"):
        PerplexitySettings().validate()


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"protocol": ProtocolSettings("window")}, r"protocol\.name=window .*did you mean windows\?"),
        ({"engine": EngineSettings(kv="f23")}, r"engine\.kv=f23 .*did you mean f32\?"),
        ({"cluster": ClusterSettings("lcoal")}, r"did you mean local\?"),
        ({"tracking": TrackingSettings("sever")}, r"did you mean server\?"),
        ({"data": DataSettings(path="t", format="json")}, r"did you mean jsonl\?"),
        ({"data": DataSettings(path="t", sha256="12")}, r"data\.sha256=12 .*64 hexadecimal"),
        ({"data": DataSettings(path="t", format="jsonl", field="")}, r"data\.field"),
        ({"data": DataSettings(path="t", format="parquet", field="")}, r"format=parquet needs data\.field"),
        ({"data": DataSettings(path="t", documents="joint")}, r"did you mean joined\?"),
        ({"data": DataSettings(path="t", errors="ignore")}, r"data\.errors=ignore is not known"),
        ({"data": DataSettings(path="t", files=["a"])}, r"data\.path=t and data\.files=.*give one"),
        ({"data": DataSettings(path="t", weight="w")}, r"data\.weight=w needs data\.format"),
        ({"data": DataSettings(path="t", weight="w", format="jsonl")}, r"needs data\.documents=apart"),
        ({"protocol": ProtocolSettings("strided", 8, stride=8)}, r"stride=8 is too large; .*window=8"),
        ({"protocol": ProtocolSettings("strided", stride=0)}, r"protocol\.stride=0 is too small"),
        ({"protocol": ProtocolSettings(window=2)}, r"protocol\.window=2 is too small; expected 3"),
        ({"protocol": ProtocolSettings(limit=0)}, r"protocol\.limit=0 is too small; expected 1"),
        ({"engine": EngineSettings(threads=0)}, r"engine\.threads=0"),
        ({"engine": EngineSettings(batch_tokens=-1)}, r"engine\.batch_tokens=-1"),
        ({"cluster": ClusterSettings(workers=0)}, r"cluster\.workers=0"),
        ({"cluster": ClusterSettings(threads_per_worker=-2)}, r"cluster\.threads_per_worker=-2"),
        ({"cluster": ClusterSettings(windows_per_shard=0)}, r"cluster\.windows_per_shard=0"),
        ({"seed": -1}, r"seed=-1"),
        ({"paths": PathsSettings(results=" ")}, r"paths\.results is not set"),
    ],
)
def test_each_bad_value_is_refused_by_name(groups, said):
    with pytest.raises(SettingsError, match=said) as caught:
        settings(**groups).validate()
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_all_problems_come_in_one_message():
    with pytest.raises(SettingsError, match=r"(?s)3 settings.*window=0.*threads=0.*workers=-1"):
        settings(
            protocol=ProtocolSettings(window=0),
            engine=EngineSettings(threads=0),
            cluster=ClusterSettings(workers=-1),
        ).validate()


def test_a_server_needs_an_address(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SettingsError, match=r"tracking\.uri"):
        settings(tracking=TrackingSettings("server")).validate()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert settings(tracking=TrackingSettings("server")).validate() == []


def test_what_is_ignored_is_a_warning():
    warnings = settings(
        cluster=ClusterSettings("inline", workers=2, address="h:1"),
        tracking=TrackingSettings("none", uri="http://x"),
    ).validate()
    assert [warning.split("=")[0] for warning in warnings] == [
        "cluster.address",
        "tracking.uri",
        "cluster.workers",
    ]


def test_a_stride_of_another_protocol_is_ignored_and_said():
    assert "protocol.stride=4 is ignored" in settings(protocol=ProtocolSettings(stride=4)).validate()[0]
    assert settings(protocol=ProtocolSettings("strided", stride=4)).validate() == []


def test_resolved_data_name_files_urls_and_what_becomes_of_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = settings(data=DataSettings(path="", files=["a", "s3://b/c"])).resolved().data
    assert data.files == [str(tmp_path / "a"), "s3://b/c"]
    assert data.path == f"{tmp_path / 'a'}, s3://b/c"
    assert settings(data=DataSettings(path="https://h/t.txt")).resolved().data.path == "https://h/t.txt"
    for name, documents in {"windows": "joined", "strided": "joined", "document": "apart"}.items():
        made = settings(protocol=ProtocolSettings(name))
        assert made.resolved().data.documents == documents
        assert made.resolved().resolved() == made.resolved()
        assert made.resolved().validate() == []
    weighted = DataSettings(path="t", weight="w", format="jsonl")
    assert settings(data=weighted, protocol=ProtocolSettings("document")).validate() == []


def test_resolved_paths_are_absolute_and_threads_decided(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = settings(
        data=DataSettings(path="python:pydoc_data.topics"),
        paths=PathsSettings(results="out"),
        cluster=ClusterSettings(threads_per_worker=2),
    )
    s = given.resolved()
    assert s.paths.results == str(tmp_path / "out")
    assert s.paths.cache == str(tmp_path / ".cache/pagemill")
    assert s.data.path == "python:pydoc_data.topics"
    assert s.model.path == str(tmp_path / "m.gguf")
    assert s.engine.threads == s.cluster.threads_per_worker == 2
    assert settings(engine=EngineSettings(threads=3)).resolved().cluster.threads_per_worker == 3


def test_schema_takes_overrides_and_refuses_unknown_keys_and_types():
    schema = OmegaConf.structured(PerplexitySettings)
    OmegaConf.set_struct(schema, True)
    merged = OmegaConf.merge(
        schema, OmegaConf.from_dotlist(["model.path=a", "data.path=b", "cluster.workers=2"])
    )
    made = OmegaConf.to_object(merged)
    assert isinstance(made, PerplexitySettings)
    assert isinstance(made.cluster, ClusterSettings)
    assert made.cluster.workers == 2
    assert made.validate() == []
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(schema, {"protocol": {"windw": 3}})
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"protocol": {"window": "many"}})
    assert all(is_dataclass(part.default_factory) for part in fields(PerplexitySettings)[:7])


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, pipeline, pipeline.settings, pipeline.errors, pipeline.worker\n"
        "heavy = {'numpy', 'numba', 'pyarrow', 'ray', 'mlflow', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
