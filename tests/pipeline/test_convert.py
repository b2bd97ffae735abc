"""Checkpoints become files that the engine and libllama run, with the weights that went in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

import engine
from pipeline.convert.llama import llama3_factors
from tests.checkpoints import (
    CONFIGS,
    llama_checkpoint,
    make_checkpoint,
    mamba2_tensors,
    mamba_tensors,
    write_safetensors,
)
from tests.make_gguf import llama_extra, tiny_llama
from tests.pipeline.conversions import converted, engine_logits, libllama_logits, tensors_of, types_of

KINDS = ("mamba", "falcon", "mamba2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mamba_becomes_ggufs_tensors_and_keys(tmp_path: Path, kind: str) -> None:
    summary = converted(make_checkpoint(tmp_path / "hf", kind), tmp_path / "m.gguf")
    found, config = tensors_of(tmp_path / "m.gguf"), CONFIGS[kind]
    source = (mamba2_tensors if kind == "mamba2" else mamba_tensors)(config)
    layer, there = "backbone.layers.1.mixer.", "blk.1."
    heads = config.get("num_heads", 128)
    wanted = {
        "token_embd.weight": source["backbone.embeddings.weight"],
        "output_norm.weight": source["backbone.norm_f.weight"],
        f"{there}attn_norm.weight": source["backbone.layers.1.norm.weight"],
        f"{there}ssm_in.weight": source[f"{layer}in_proj.weight"],
        f"{there}ssm_conv1d.weight": source[f"{layer}conv1d.weight"][:, 0],
        f"{there}ssm_conv1d.bias": source[f"{layer}conv1d.bias"],
        f"{there}ssm_out.weight": source[f"{layer}out_proj.weight"],
        f"{there}ssm_a": -np.exp(source[f"{layer}A_log"]),
        f"{there}ssm_d": source[f"{layer}D"],
    }
    if kind == "mamba2":
        wanted[f"{there}ssm_a"] = wanted[f"{there}ssm_a"].reshape(heads, 1)
        wanted[f"{there}ssm_d"] = wanted[f"{there}ssm_d"].reshape(heads, 1)
        wanted[f"{there}ssm_norm.weight"] = source[f"{layer}norm.weight"].reshape(2, 64)
        wanted[f"{there}ssm_dt.bias"] = source[f"{layer}dt_bias"]
    else:
        wanted[f"{there}ssm_x.weight"] = source[f"{layer}x_proj.weight"]
        wanted[f"{there}ssm_dt.weight"] = source[f"{layer}dt_proj.weight"]
        wanted[f"{there}ssm_dt.bias"] = source[f"{layer}dt_proj.bias"]
    for name, values in wanted.items():
        assert found[name].shape == values.shape, name
        assert np.array_equal(found[name], values), name
    assert len(found) == 2 + 2 * (len(wanted) - 2) == summary["n_tensors"]
    keys = {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128,
        "ssm.state_size": 16,
        "embedding_length": 64,
        "feed_forward_length": 0,
        "attention.head_count": heads if kind == "mamba2" else 0,
        "block_count": 2,
        "context_length": 1 << 20,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    }
    if kind == "mamba2":
        keys |= {"ssm.time_step_rank": heads, "ssm.group_count": 2}
    else:
        keys |= {"ssm.time_step_rank": 4, "ssm.dt_b_c_rms": kind == "falcon"}
    name = "mamba2" if kind == "mamba2" else "mamba"
    with engine.open(tmp_path / "m.gguf") as file:
        assert {key: file.metadata[f"{name}.{key}"] for key in keys} == keys
        assert file.metadata["general.architecture"] == name == summary["architecture"]
        tokenizer = engine.Tokenizer(file)
        assert (tokenizer.pre, tokenizer.n_vocab, tokenizer.bos_id) == (
            "gpt-2",
            len(found["token_embd.weight"]),
            0,
        )
    assert (summary["tied"], summary["n_vocab"], summary["n_vocab_padded"]) == (True, 290, tokenizer.n_vocab)


@pytest.mark.parametrize("kind", KINDS)
def test_libllama_runs_a_converted_mamba(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")
    converted(make_checkpoint(tmp_path / "hf", kind), tmp_path / "m.gguf")
    logits = libllama_logits(tmp_path / "m.gguf")
    assert np.isfinite(logits).all()
    assert logits.std() > 0.5


def original(config: dict[str, object], tensors: dict[str, np.ndarray]) -> None:
    """Names of the original repository, whose config names no architecture."""
    for name in list(tensors):
        tensors[name.replace("embeddings", "embedding")] = tensors.pop(name)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]


def loose(config: dict[str, object], tensors: dict[str, np.ndarray]) -> None:
    """`model.layers`, and no mixer in the names."""
    for name in list(tensors):
        renamed = name.replace("backbone.embeddings", "model.embedding").replace("mixer.", "")
        tensors[renamed.replace("backbone.", "model.")] = tensors.pop(name)


ORIGINAL = {key: None for key in CONFIGS["mamba"] if key not in ("rms_norm", "vocab_size")}
ORIGINAL |= {"d_model": 64, "n_layer": 2, "pad_vocab_size_multiple": 8, "fused_add_norm": True}


@pytest.mark.parametrize(
    ("rename", "changes"),
    [
        (original, ORIGINAL | {"ssm_cfg": {"dt_rank": "auto"}}),
        (original, ORIGINAL | {"vocab_size": 290, "architectures": ["MambaLMHeadModel"]}),
        (loose, {}),
    ],
    ids=["original", "original, a padded embedding", "model.layers"],
)
def test_other_namings_give_the_same_tensors(tmp_path: Path, rename, changes) -> None:
    converted(make_checkpoint(tmp_path / "hf", "mamba"), tmp_path / "m.gguf")
    here = make_checkpoint(tmp_path / "other", "mamba")
    config = CONFIGS["mamba"] | changes
    (here / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    tensors = mamba_tensors(CONFIGS["mamba"])
    rename(config, tensors)
    write_safetensors(here / "model.safetensors", tensors)
    converted(here, tmp_path / "other.gguf")
    one, other = tensors_of(tmp_path / "m.gguf"), tensors_of(tmp_path / "other.gguf")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_original_mamba2_is_known_by_its_ssm_cfg(tmp_path: Path) -> None:
    config = {key: None for key in CONFIGS["mamba2"]} | {
        "d_model": 64, "n_layer": 2, "vocab_size": 299, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 32, "ngroups": 2},
    }  # fmt: skip
    folder = make_checkpoint(tmp_path / "hf", "mamba2")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    summary = converted(folder, tmp_path / "m.gguf")
    assert (summary["architecture"], summary["n_vocab_padded"], summary["tied"]) == ("mamba2", 304, True)


def test_an_output_of_its_own_is_kept_and_one_that_is_the_embedding_is_not(tmp_path: Path) -> None:
    embedding = mamba_tensors(CONFIGS["mamba"])["backbone.embeddings.weight"]
    for other, tied in ((embedding, True), (embedding + 1, False)):
        folder = make_checkpoint(
            tmp_path / f"{tied}", "mamba", edit=lambda t, other=other: t.update({"lm_head.weight": other})
        )
        assert converted(folder, tmp_path / f"{tied}.gguf")["tied"] is tied
        assert ("output.weight" in tensors_of(tmp_path / f"{tied}.gguf")) is not tied


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_vocabulary_is_padded_by_rows_of_zeros(tmp_path: Path, kind: str) -> None:
    folder = make_checkpoint(
        tmp_path / "hf", kind, {"vocab_size": 290, "tie_word_embeddings": False},
        edit=lambda t: t.update({"lm_head.weight": t["backbone.embeddings.weight"] + 1}),
    )  # fmt: skip
    summary = converted(folder, tmp_path / "m.gguf")
    padded = 296 if kind == "mamba" else 304
    assert (summary["n_vocab"], summary["n_vocab_padded"]) == (290, padded)
    assert f"vocabulary padded from 290 to {padded}" in summary["warnings"][0]
    for name in ("token_embd.weight", "output.weight"):
        values = tensors_of(tmp_path / "m.gguf")[name]
        assert len(values) == padded
        assert values[:290].any(axis=1).all()
        assert not values[290:].any()
    with engine.open(tmp_path / "m.gguf") as file:
        types = np.array(file.metadata["tokenizer.ggml.token_type"])
        assert (types[290:] == 5).all()
        assert engine.Tokenizer(file).n_vocab == padded
    one = make_checkpoint(tmp_path / "one", kind, {"vocab_size": 290, "pad_vocab_size_multiple": 1})
    assert converted(one, tmp_path / "one.gguf")["n_vocab_padded"] == 290


def test_a_convolution_without_bias_gets_one_of_zeros(tmp_path: Path) -> None:
    def edit(tensors) -> None:
        for name in [name for name in tensors if name.endswith("conv1d.bias")]:
            del tensors[name]

    folder = make_checkpoint(tmp_path / "hf", "mamba", {"use_conv_bias": False}, edit=edit)
    converted(folder, tmp_path / "m.gguf")
    assert not tensors_of(tmp_path / "m.gguf")["blk.0.ssm_conv1d.bias"].any()


LLAMAS = {
    "llama": ("LlamaForCausalLM", {}, {}),
    "untied, odd widths": (
        "LlamaForCausalLM",
        {"n_heads": 6, "n_kv_heads": 2, "width": 90, "head_width": 14, "ff": 101, "tied": False},
        {},
    ),
    "biases": (
        "LlamaForCausalLM", {"extra": llama_extra(("attn_q", "attn_k", "attn_v", "attn_output"))}, {}
    ),
    "mistral, linear": (
        "MistralForCausalLM",
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "sliding_window": None},
    ),
    "llama 3": (
        "LlamaForCausalLM",
        {"extra": llama_extra(rope_freqs=llama3_factors(10000.0, 16, 8.0, 1.0, 4.0, 32).tolist())},
        {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2, yarn": (
        "Qwen2ForCausalLM",
        {
            "architecture": "qwen2",
            "extra": llama_extra(("attn_q", "attn_k", "attn_v")),
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 32,
        },
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
            },
            "rope_theta": None,
            "use_sliding_window": False,
            "sliding_window": 16,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"architecture": "qwen3", "extra": llama_extra(head_norms=True)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llama_gives_the_logits_of_the_file_that_its_weights_are_from(tmp_path: Path, name: str) -> None:
    architecture, shape, changes = LLAMAS[name]
    first = tiny_llama(tmp_path / "first.gguf", **shape)
    folder = llama_checkpoint(tmp_path / "hf", first, architecture=architecture, changes=changes)
    summary = converted(folder, tmp_path / "m.gguf")
    assert summary["tied"] is shape.get("tied", True)
    ours = engine_logits(tmp_path / "m.gguf")
    assert np.array_equal(ours, engine_logits(first))
    if name in ("llama", "qwen3"):
        pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")
        assert np.abs(libllama_logits(tmp_path / "m.gguf") - ours).max() < 2e-4


def test_llama_3s_factors_are_the_papers() -> None:
    found = llama3_factors(500000.0, 128, 8.0, 1.0, 4.0, 8192)
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(64) / 64)
    smooth = (8192 / wavelength - 1) / 3
    wanted = np.where(
        wavelength < 8192 / 4, 1.0, np.where(wavelength > 8192, 8.0, 1 / ((1 - smooth) / 8 + smooth))
    )
    assert np.allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_types_are_bit_for_bit_those_of_the_gguf_package(tmp_path: Path, type_: str) -> None:
    converted(make_checkpoint(tmp_path / "hf", "mamba"), tmp_path / "m.gguf", type_)
    source, kind = mamba_tensors(CONFIGS["mamba"]), type_.upper()
    types = types_of(tmp_path / "m.gguf")
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, here in (
        ("token_embd.weight", "backbone.embeddings.weight"),
        ("blk.0.ssm_in.weight", "backbone.layers.0.mixer.in_proj.weight"),
        ("blk.1.ssm_x.weight", "backbone.layers.1.mixer.x_proj.weight"),
    ):
        assert types[name] == kind
        wanted = gguf.quants.quantize(source[here], gguf.GGMLQuantizationType[kind])
        assert raw[name].data.tobytes() == wanted.tobytes()
    four_columns = "F16" if type_.startswith("q") else kind
    assert types["blk.0.ssm_dt.weight"] == four_columns, "no whole blocks in a row of 4"
    always = [
        name for name in types if not name.endswith(("_in.weight", "_x.weight", "_out.weight", "embd.weight"))
    ]
    assert all(
        types[name] == "F32" for name in always if name not in ("blk.0.ssm_dt.weight", "blk.1.ssm_dt.weight")
    )
    with engine.open(tmp_path / "m.gguf") as file:
        assert (
            file.metadata["general.file_type"]
            == gguf.LlamaFileType["ALL_F32" if type_ == "f32" else f"MOSTLY_{kind}"]
        )


@pytest.mark.parametrize("type_", ["F16", "BF16"])
def test_halves_in_the_checkpoint_are_read_exactly(tmp_path: Path, type_: str) -> None:
    def edit(tensors) -> None:
        for name, values in tensors.items():
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            tensors[name] = values.astype(np.float16) if type_ == "F16" else bits

    converted(make_checkpoint(tmp_path / "hf", "mamba", edit=edit), tmp_path / "m.gguf")
    source = mamba_tensors(CONFIGS["mamba"])["backbone.layers.0.mixer.in_proj.weight"]
    exact = source.astype(np.float16).astype(np.float32)
    if type_ == "BF16":
        exact = (source.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert np.array_equal(tensors_of(tmp_path / "m.gguf")["blk.0.ssm_in.weight"], exact)


def test_shards_give_the_bytes_of_one_file_and_so_does_a_second_run(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    whole = converted(folder, tmp_path / "whole.gguf", "q8_0")
    tensors = mamba_tensors(CONFIGS["mamba"])
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if places[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    again = converted(folder, tmp_path / "again.gguf", "q8_0")
    assert again["sha256"] == whole["sha256"]
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert again["bytes"] == (tmp_path / "again.gguf").stat().st_size


def test_large_tensors_are_never_in_memory_whole(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mamba", {"vocab_size": 200_000, "num_hidden_layers": 1})
    from pipeline.convert import writer
    from pipeline.convert.checkpoint import open_checkpoint
    from pipeline.convert.mamba import plan_mamba
    from pipeline.memory import process_memory

    plan = plan_mamba(open_checkpoint(folder), "MambaForCausalLM")
    before = int(process_memory()["anonymous_bytes"])
    written = writer.write(plan, {}, "large", "q8_0", tmp_path / "m.gguf")
    assert written.n_bytes > 200_000 * 64
    assert written.peak_anonymous_bytes - before < 30 << 20, "the embedding alone is 51 MB"


def test_pytorchs_own_format_is_read_where_torch_is(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    one = converted(folder, tmp_path / "one.gguf")
    (folder / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(values) for name, values in mamba_tensors(CONFIGS["mamba"]).items()}
    torch.save(
        tensors | {"lm_head.weight": tensors["backbone.embeddings.weight"]}, folder / "pytorch_model.bin"
    )
    assert converted(folder, tmp_path / "other.gguf")["sha256"] == one["sha256"]
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    converted(folder, tmp_path / "bf16.gguf", "bf16")


@pytest.mark.parametrize(
    "type_",
    [
        "f32",
        pytest.param("f16", marks=pytest.mark.slow),
        "q8_0",
        pytest.param("q4_0", marks=pytest.mark.slow),
    ],
)
def test_mamba_tiny_converts_and_libllama_agrees_with_the_reference(
    tmp_path: Path, shared_data: Path, type_: str
) -> None:
    folder = shared_data / "models" / "mamba-tiny"
    summary = converted(folder, tmp_path / "m.gguf", type_)
    assert (summary["n_vocab"], summary["n_vocab_padded"], summary["tied"]) == (4090, 4096, True)
    assert (summary["pre_tokenizer"], summary["architecture"], summary["n_tensors"]) == ("gpt-2", "mamba", 52)
    pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")
    from tests.engine.test_live_oracle import LibLlama

    oracle = np.load(shared_data / "oracle" / "mamba-tiny.npz")
    tokens = oracle["tokens"].reshape(40, 512)[0].astype(np.int32)
    nll = LibLlama(tmp_path / "m.gguf").score(tokens, 512)[256:511]
    difference = np.abs(nll - oracle["nll_windows_float64"].reshape(40, 255)[0])
    assert difference.max() < {"f32": 2e-4, "f16": 0.02, "q8_0": 0.2, "q4_0": 1.5}[type_]


def test_mamba_tinys_tokenizer_is_the_librarys(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "models" / "mamba-tiny"
    from tokenizers import Tokenizer

    converted(folder, tmp_path / "m.gguf", "q4_0")
    text = "It's 1,234 words ;  naïve caf\u00e9s \u4e2d\n\n don't\t stop." * 3
    with engine.open(tmp_path / "m.gguf") as file:
        ids = engine.Tokenizer(file).encode(text)
    assert ids.tolist() == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def test_the_folder_leaves_no_trace_but_its_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    copy = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, copy)
    one, other = converted(folder, tmp_path / "a.gguf", "q8_0"), converted(copy, tmp_path / "b.gguf", "q8_0")
    assert one["sha256"] == other["sha256"]
