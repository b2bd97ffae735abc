"""What cannot be converted is refused before or while it is read; nothing is left of the file."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.convert import writer
from pipeline.errors import ModelError, PipelineError, SettingsError, StorageFailure, StoreError
from tests.checkpoints import (
    CONFIGS,
    byte_level_tokenizer,
    llama_checkpoint,
    make_checkpoint,
    mamba_tensors,
    write_safetensors,
)
from tests.make_gguf import tiny_llama
from tests.pipeline.conversions import converted, tensors_of

A_LOG, IN = "backbone.layers.1.mixer.A_log", "backbone.layers.0.mixer.in_proj.weight"


def refused(folder: Path, out: Path, *words: str, error: type[PipelineError] = ModelError, **choices) -> None:
    """The conversion raises `error` with all `words` in its message or hint, and leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error) as info:
        converted(folder, out, **choices)
    said = f"{info.value} {info.value.hint}"
    assert [word for word in words if word not in said] == [], said
    assert sorted(out.parent.iterdir()) == before


CONFIG_FAULTS = {
    "sizes contradict": ("mamba", {"intermediate_size": 96}, ["intermediate_size = 96", "2 x 64 = 128"]),
    "names contradict": ("mamba", {"d_model": 32}, ["hidden_size = 64", "d_model = 32"]),
    "tensors contradict": ("mamba", {"state_size": 8}, ["x_proj.weight", "[36, 128]", "[20, 128]"]),
    "falcon's tensors decide": ("falcon", {"intermediate_size": 96}, ["[256, 64]", "[192, 64]"]),
    "heads contradict": ("mamba2", {"num_heads": 3}, ["3 heads of head_dim = 32", "128"]),
    "groups do not divide": ("mamba2", {"n_groups": 3}, ["4 heads", "n_groups = 3"]),
    "clamped steps": ("mamba2", {"time_step_limit": [0.1, 1.0]}, ["time_step_limit", "[0, Infinity]"]),
    "norm in front": (
        "mamba2", {"ssm_cfg": {"norm_before_gate": True}, "norm_before_gate": None}, ["norm_before_gate"]
    ),
    "biases": ("mamba", {"use_bias": True}, ["use_bias", "no biases"]),
    "layer norms": ("mamba", {"rms_norm": False}, ["rms_norm", "RMS"]),
    "attention": ("mamba", {"attn_layer_idx": [3]}, ["attn_layer_idx", "no attention"]),
    "other activation": ("mamba", {"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "SiLU"]),
    "a layer too many": ("mamba", {"num_hidden_layers": 1}, ["of layer 1", "1 layers, from 0"]),
    "a layer too few": ("mamba", {"num_hidden_layers": 3}, ["backbone.layers.2.", "9 more missing"]),
    "no size": ("mamba", {"hidden_size": None}, ["hidden_size is None", "positive int"]),
    "size is text": ("mamba", {"conv_kernel": "4"}, ["conv_kernel is '4'"]),
    "epsilon is zero": ("mamba", {"layer_norm_epsilon": 0}, ["layer_norm_epsilon is 0"]),
    "flag is text": ("mamba", {"use_conv_bias": "yes"}, ["use_conv_bias is 'yes'"]),
    "vocabulary": ("mamba", {"vocab_size": 400}, ["embeddings.weight", "[296, 64]", "[400, 64]"]),
    "not tied": ("mamba", {"tie_word_embeddings": False}, ["tie_word_embeddings is false", "no output"]),
    "unknown": ("mamba", {"architectures": ["Mamba3ForCausalLM"]}, ["'Mamba3ForC", "did you mean Mamba"]),
    "none": ("mamba", {"architectures": None, "model_type": None}, ["architecture ''"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_configs_that_contradict_themselves_or_the_weights(tmp_path: Path, name: str) -> None:
    kind, changes, words = CONFIG_FAULTS[name]
    refused(make_checkpoint(tmp_path / "hf", kind, lies=changes), tmp_path / "m.gguf", "config.json", *words)


def rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


TENSOR_FAULTS = {
    "unknown": (
        rename(A_LOG, "backbone.layers.1.mixer.A_lag"), {}, ["mixer.A_lag'", f"has one is '{A_LOG}"]
    ),
    "more": (lambda t: t.update({f"{IN}_lora": t[IN]}), {}, [f"{IN}_lora", f"'{IN}'"]),
    "missing": (lambda t: t.pop(A_LOG), {}, [f"tensor '{A_LOG}' missing", "config.json"]),
    "shape": (lambda t: t.update({IN: t[IN][:, :-1].copy()}), {}, [IN, "[256, 63]", "[256, 64]"]),
    "twice": (
        lambda t: t.update({"backbone.embedding.weight": t["backbone.embeddings.weight"]}), {}, ["same"]
    ),
    "type": (lambda t: t.update({A_LOG: np.zeros((128, 16), np.int32)}), {}, [A_LOG, "'I32'", "F32, F16"]),
    "said to be tied": (
        lambda t: t.update({"lm_head.weight": t["backbone.embeddings.weight"] + 1}),
        {"tie_word_embeddings": True},
        ["tie_word_embeddings is true", "lm_head.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str) -> None:
    edit, changes, words = TENSOR_FAULTS[name]
    refused(make_checkpoint(tmp_path / "hf", "mamba", changes, edit=edit), tmp_path / "m.gguf", *words)


@pytest.mark.parametrize(
    ("tensor", "at", "value", "said"),
    [
        (IN, (17, 5), np.nan, "in_proj.weight[17, 5] is nan"),
        (IN, (255, 63), -np.inf, "in_proj.weight[255, 63] is -inf"),
        ("backbone.norm_f.weight", (3,), np.nan, "norm_f.weight[3] is nan"),
        (A_LOG, (7, 2), 100.0, "ssm_a, which is made of backbone.layers.1.mixer.A_log[7, 2] is -inf"),
        (IN, (1, 2), 1e6, "in_proj.weight[1, 2] is 1e+06, too large for F16"),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, tensor, at, value, said) -> None:
    def edit(tensors) -> None:
        tensors[tensor][at] = value

    folder = make_checkpoint(tmp_path / "hf", "mamba", edit=edit)
    refused(folder, tmp_path / "m.gguf", "model.safetensors", said, type_="f16")


def test_a_broken_weight_of_q_is_named_by_the_checkpoints_row(tmp_path: Path) -> None:
    folder = llama_checkpoint(tmp_path / "hf", tiny_llama(tmp_path / "first.gguf"))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    row = json.loads(raw[8 : 8 + length])["model.layers.0.self_attn.q_proj.weight"]
    at = 8 + length + row["data_offsets"][0] + 4 * (9 * 64 + 3)
    raw[at : at + 4] = np.float32(np.nan).tobytes()
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder, tmp_path / "m.gguf", "q_proj.weight[9, 3] is nan")


LLAMA_FAULTS = {
    "rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'", "llama3, yarn"]),
    "yarn's constants": ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16}}, ["beta_fast"]),
    "yarn's factor": ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 2}}, ["attention_"]),
    "llama3's order": (
        {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        ["high_freq_factor"],
    ),
    "rope is text": ({"rope_scaling": "linear"}, ["rope_scaling is no object"]),
    "part of a head": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "windows in some layers": ({"layer_types": ["sliding_attention", "full_attention"]}, ["sliding"]),
    "kv heads": ({"num_key_value_heads": 3}, ["4 heads", "num_key_value_heads = 3"]),
    "heads": ({"num_attention_heads": 5, "head_dim": None}, ["hidden_size = 64", "num_attention_heads = 5"]),
    "head width": ({"head_dim": 8}, ["q_proj.weight", "[64, 64]", "[32, 64]"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMA_FAULTS)
def test_llamas_that_gguf_has_no_words_for(tmp_path: Path, name: str) -> None:
    changes, words = LLAMA_FAULTS[name]
    folder = llama_checkpoint(tmp_path / "hf", tiny_llama(tmp_path / "first.gguf"), changes=changes)
    refused(folder, tmp_path / "m.gguf", *words)


def test_a_window_that_all_layers_have_is_said_to_be_lost(tmp_path: Path) -> None:
    first = tiny_llama(tmp_path / "first.gguf")
    folder = llama_checkpoint(tmp_path / "hf", first, changes={"sliding_window": 32})
    assert "sliding_window = 32 is lost" in converted(folder, tmp_path / "m.gguf")["warnings"][0]


def test_epsilons_that_become_one_are_said_to_be_lost(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "falcon", {"mixer_rms_eps": 1e-6})
    warnings = converted(folder, tmp_path / "m.gguf")["warnings"]
    assert any("mixer_rms_eps = 1e-06 is lost" in warning for warning in warnings)
    assert any("expand x hidden_size = 16 x 64 = 1024" in warning for warning in warnings)


def test_another_expansion_is_converted_and_llama_cpp_is_said_to_refuse_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mamba", {"expand": 3, "intermediate_size": 192})
    assert "llama.cpp will not load" in converted(folder, tmp_path / "m.gguf")["warnings"][0]


BROKEN_FILES = {
    "empty": (lambda raw: b"", ["0 bytes"]),
    "no header": (lambda raw: b"\xff" * 64, ["header is said to have"]),
    "cut short": (lambda raw: raw[:-4], ["ends at byte", "download"]),
    "not JSON": (lambda raw: raw[:8] + b"?" + raw[9:], ["not JSON"]),
    "a list": (lambda raw: (8).to_bytes(8, "little") + b"[1, 2]  ", ["no JSON object"]),
    "no offsets": (lambda raw: raw.replace(b'"data_offsets"', b'"data_offzets"', 1), ["two data_offsets"]),
    "other shape": (lambda raw: raw.replace(b"[296, 64]", b"[296, 65]", 1), ["does not go into"]),
    "negative": (lambda raw: raw.replace(b"[296, 64]", b"[-96, 64]", 1), ["does not go into"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_safetensors_that_are_broken(tmp_path: Path, name: str) -> None:
    change, words = BROKEN_FILES[name]
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    refused(folder, tmp_path / "m.gguf", "model.safetensors", *words)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    refused(tmp_path / "none", tmp_path / "m.gguf", "there is no folder")
    (tmp_path / "hf").mkdir()
    refused(tmp_path / "hf", tmp_path / "m.gguf", "config.json")
    for text, word in (("{", "not JSON"), ("[]", "no JSON object")):
        (tmp_path / "hf" / "config.json").write_text(text)
        refused(tmp_path / "hf", tmp_path / "m.gguf", word)
    (tmp_path / "hf" / "config.json").write_text("{}")
    refused(tmp_path / "hf", tmp_path / "m.gguf", "no weights", "model.safetensors")


def test_indices_that_do_not_agree_with_their_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    path.rename(folder / "a.safetensors")
    names = list(mamba_tensors(CONFIGS["mamba"]))
    for places, words in (
        (None, ["no weight_map"]),
        ({name: "b.safetensors" for name in names}, ["b.safetensors, which is not there"]),
        ({name: "../a.safetensors" for name in names}, ["expected one beside it"]),
        ({name: "a.safetensors" for name in [*names, "more"]}, ["'more' is not in a.safetensors"]),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        refused(folder, tmp_path / "m.gguf", *words)
    write_safetensors(folder / "b.safetensors", {names[0]: np.zeros((1, 1), np.float32)})
    places = {name: "a.safetensors" for name in names} | {names[0]: "b.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    refused(folder, tmp_path / "m.gguf", names[0], "is in")


def test_pytorchs_own_format_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, tmp_path / "m.gguf", "pytorch_model.bin", "only torch", "pip install torch")


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mamba", tokenizer=byte_level_tokenizer(297))
    refused(folder, tmp_path / "m.gguf", "297 tokens", "296 rows", "convert.tokenizer")


def test_a_file_that_is_there_is_replaced_only_when_that_is_said(tmp_path: Path) -> None:
    folder, out = make_checkpoint(tmp_path / "hf", "mamba"), tmp_path / "m.gguf"
    out.write_text("mine")
    refused(folder, out, "exists", "convert.overwrite", error=StoreError)
    assert out.read_text() == "mine"
    converted(folder, out, overwrite=True)
    assert "blk.0.ssm_a" in tensors_of(out)
    refused(folder, tmp_path / "hf", "exists", error=StoreError, overwrite=True)
    with pytest.raises(StoreError, match="no folder"):
        converted(folder, tmp_path / "no" / "m.gguf")


def test_too_little_room_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    refused(folder, tmp_path / "m.gguf", "1,000 bytes free", "make room", error=StoreError)


@pytest.mark.parametrize("room", [1000, 100_000])
def test_a_disk_that_fills_leaves_no_half_file(tmp_path: Path, room: int) -> None:
    """The kernel refuses to let a file grow, in the head or among the weights, and an old file stays."""
    folder, out = make_checkpoint(tmp_path / "hf", "mamba"), tmp_path / "m.gguf"
    out.write_text("mine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        refused(folder, out, "m.gguf", "nothing is left", error=StorageFailure, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_text() == "mine"


def test_an_interrupt_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(kind: object, values: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "encode", interrupt)
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    with pytest.raises(KeyboardInterrupt):
        converted(folder, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_settings_that_name_no_type_or_no_place(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "m.gguf", "q8_1", "did you mean q8_0", error=SettingsError, type_="q8_1")
    with pytest.raises(SettingsError, match=r"source\.dir is not set"):
        converted(Path(" "), tmp_path / "m.gguf")
