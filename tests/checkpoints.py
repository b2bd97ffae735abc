"""Writes tiny Hugging Face checkpoints with random weights, without torch: what `convert` reads.

`make_checkpoint(folder, "mamba")` draws weights; `llama_checkpoint(folder, gguf_file)` takes a GGUF file's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engine
from tests.make_gguf import byte_level_vocabulary

Tensors = dict[str, NDArray[Any]]

_NAMES = {"f4": "F32", "f2": "F16", "u2": "BF16", "i4": "I32"}  # bfloat16 as the integers of its bits

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": 296,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "time_step_rank": 4,
        "conv_kernel": 4,
        "num_hidden_layers": 2,
        "expand": 2,
        "layer_norm_epsilon": 1e-5,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "rms_norm": True,
    },
    "mamba2": {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": 304,
        "hidden_size": 64,
        "state_size": 16,
        "num_heads": 4,
        "head_dim": 32,
        "n_groups": 2,
        "conv_kernel": 4,
        "num_hidden_layers": 2,
        "expand": 2,
        "layer_norm_epsilon": 1e-5,
        "hidden_act": "silu",
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "norm_before_gate": True,
    },
}
CONFIGS["falcon"] = CONFIGS["mamba"] | {
    "architectures": ["FalconMambaForCausalLM"],
    "model_type": "falcon_mamba",
    "expand": 16,  # FalconMamba's own config.json says this of an inner width of twice the model's
    "mixer_rms_eps": 1e-5,
}


def make_checkpoint(
    folder: Path,
    kind: str,
    changes: Mapping[str, Any] | None = None,
    *,
    lies: Mapping[str, Any] | None = None,
    edit: Callable[[Tensors], object] = len,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """A folder with a model of CONFIGS.

    Args:
        changes: of the config; None leaves a key out.
        lies: changes of the config that the weights know nothing of.
        edit: changes the tensors before they are written.
        tokenizer: tokenizer.json; one of 290 tokens where it is not given.
    """
    config = CONFIGS[kind] | dict(changes or {})
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in (config | dict(lies or {})).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    tensors = (mamba2_tensors if kind == "mamba2" else mamba_tensors)(config)
    edit(tensors)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or byte_level_tokenizer(290)))
    return folder


def mamba_tensors(config: Mapping[str, Any]) -> Tensors:
    """Random weights of a Mamba, its output tied; logits spread by a few nats."""
    draw = _Draw()
    width, inner, state = config["hidden_size"], config["intermediate_size"], config["state_size"]
    rank, kernel = config["time_step_rank"], config["conv_kernel"]
    tensors = {"backbone.embeddings.weight": draw(config["vocab_size"], width, spread=1.0)}
    for layer in range(config["num_hidden_layers"]):
        tensors |= {
            f"backbone.layers.{layer}.{name}": values
            for name, values in {
                "norm.weight": 1 + draw(width, spread=0.1),
                "mixer.in_proj.weight": draw(2 * inner, width),
                "mixer.conv1d.weight": draw(inner, 1, kernel, spread=0.5),
                "mixer.conv1d.bias": draw(inner, spread=0.1),
                "mixer.x_proj.weight": draw(rank + 2 * state, inner),
                "mixer.dt_proj.weight": draw(inner, rank),
                "mixer.dt_proj.bias": draw(inner, spread=1.0) - 3,
                "mixer.A_log": np.log(np.arange(1, state + 1)) + draw(inner, state, spread=0.1),
                "mixer.D": 1 + draw(inner, spread=0.1),
                "mixer.out_proj.weight": draw(width, inner),
            }.items()
        }
    tensors["backbone.norm_f.weight"] = 1 + draw(width, spread=0.1)
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def mamba2_tensors(config: Mapping[str, Any]) -> Tensors:
    """Random weights of a Mamba-2, its output tied."""
    draw = _Draw()
    width, state, groups = config["hidden_size"], config["state_size"], config["n_groups"]
    heads, kernel = config["num_heads"], config["conv_kernel"]
    inner = heads * config["head_dim"]
    rows = inner + 2 * groups * state
    tensors = {"backbone.embeddings.weight": draw(config["vocab_size"], width, spread=1.0)}
    for layer in range(config["num_hidden_layers"]):
        tensors |= {
            f"backbone.layers.{layer}.{name}": values
            for name, values in {
                "norm.weight": 1 + draw(width, spread=0.1),
                "mixer.in_proj.weight": draw(inner + rows + heads, width),
                "mixer.conv1d.weight": draw(rows, 1, kernel, spread=0.5),
                "mixer.conv1d.bias": draw(rows, spread=0.1),
                "mixer.dt_bias": draw(heads, spread=1.0) - 3,
                "mixer.A_log": np.log(np.arange(1, heads + 1)),
                "mixer.D": 1 + draw(heads, spread=0.1),
                "mixer.norm.weight": 1 + draw(inner, spread=0.1),
                "mixer.out_proj.weight": draw(width, inner),
            }.items()
        }
    tensors["backbone.norm_f.weight"] = 1 + draw(width, spread=0.1)
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def llama_checkpoint(
    folder: Path,
    gguf: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """The weights of a F32 GGUF file of LLaMA's family as a Hugging Face checkpoint.

    Rows of q and k are taken from GGUF's order, which is Meta's, to Hugging Face's as transformers'
    convert_llama_weights_to_hf.py does.
    """
    with engine.open(gguf) as file:
        name = file.metadata["general.architecture"]
        said = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items()}
        tensors = {
            key: tensor.data.view(np.float32).reshape(tensor.shape).copy()
            for key, tensor in file.tensors.items()
        }
    heads, kv_heads = said["attention.head_count"], said["attention.head_count_kv"]
    config = {
        "architectures": [architecture],
        "hidden_size": said["embedding_length"],
        "intermediate_size": said["feed_forward_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": said["rope.dimension_count"],
        "rms_norm_eps": 1e-5,
        "rope_theta": said["rope.freq_base"],
        "max_position_embeddings": said["context_length"],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_act": "silu",
    } | dict(changes or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "output_norm.weight": "model.norm.weight",
    }
    renamed: Tensors = {}
    for key, values in tensors.items():
        if key == "rope_freqs.weight":
            continue
        if key in whole:
            renamed[whole[key]] = values
            continue
        _, layer, part, suffix = key.split(".")
        if name == "llama" and part in ("attn_q", "attn_k"):
            n = heads if part == "attn_q" else kv_heads
            tail = values.shape[1:]
            values = values.reshape(n, values.shape[0] // n // 2, 2, *tail).swapaxes(1, 2)
            values = values.reshape(-1, *tail)
        renamed[f"model.layers.{layer}.{parts[part]}.{suffix}"] = np.ascontiguousarray(values)
    write_safetensors(folder / "model.safetensors", renamed)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer(config["vocab_size"])))
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes tensors in the safetensors format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, values in tensors.items():
        kind = _NAMES[values.dtype.str[1:]]
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(v.tobytes() for v in tensors.values()))


def byte_level_tokenizer(
    size: int, pre_tokenizer: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with `size` tokens; the pre-tokenizer is GPT-2's by default."""
    said = byte_level_vocabulary(size)
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [merge.split(" ") for merge in said["tokenizer.ggml.merges"].value]
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    added = [
        {"id": i, "content": text, "special": True, **flags}
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == 3
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer
        or {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "byte_fallback": False,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": merges,
        }
        | changes,
    }


class _Draw:
    """Normal weights; matrices spread by 1 / sqrt(columns)."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, *shape: int, spread: float | None = None) -> NDArray[np.float64]:
        return self._rng.normal(0.0, spread or shape[-1] ** -0.5, shape)
