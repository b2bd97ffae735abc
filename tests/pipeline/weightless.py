"""Models for test_mixtures.py: metadata, and names and shapes of tensors, matrices being of two rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.quantize.mixtures import is_quantizable

ROWS = 2


class Model(NamedTuple):
    """Metadata, and tensors without their weights."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    def quantizable(self) -> list[str]:
        return [name for name, shape in self.tensors.items() if is_quantizable(name, shape)]


def llama(
    n_layers=9,
    *,
    architecture="llama",
    n_heads=8,
    n_kv_heads=8,
    width=256,
    ff=512,
    tied=False,
    n_experts=0,
    shared=False,
    qkv=False,
    extra: dict[str, tuple[int, ...]] | None = None,
) -> Model:
    """Any relative of LLaMA, its attention in one matrix (`qkv`), with experts and one for all (`shared`)."""
    keys = {
        "block_count": n_layers,
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": ff,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 8,
    }
    if n_experts:
        keys |= {"expert_count": n_experts, "expert_used_count": min(2, n_experts)}
    if architecture == "granite":
        keys |= {"embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0, "attention.scale": 1.0}
    tensors: dict[str, tuple[int, ...]] = {"token_embd": (8, width), "output_norm": (width,)}
    for layer in range(n_layers):
        block = f"blk.{layer}"
        tensors |= {f"{block}.{name}_norm": (width,) for name in ("attn", "ffn")}
        for name in ("attn_qkv", "attn_output") if qkv else ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{block}.{name}"] = (ROWS, width)
        for name, columns in {"ffn_gate": width, "ffn_up": width, "ffn_down": ff}.items():
            if n_experts:
                tensors[f"{block}.{name}_exps"] = (n_experts, ROWS, columns)
            if not n_experts or shared:
                tensors[f"{block}.{name}{'_shexp' if n_experts else ''}"] = (ROWS, columns)
        if n_experts:
            tensors[f"{block}.ffn_gate_inp"] = (n_experts, width)
    if not tied:
        tensors["output"] = (8, width)
    return _model(architecture, keys, tensors, extra)


def mamba(n_layers=5, *, second=False, width=256, rank=16, n_groups=2, tied=True) -> Model:
    """Mamba, or Mamba-2."""
    inner = 2 * width
    keys = {
        "block_count": n_layers,
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": inner,
        "ssm.state_size": 16,
        "ssm.time_step_rank": rank,
        "vocab_size": 8,
    }
    tensors: dict[str, tuple[int, ...]] = {"token_embd": (8, width), "output_norm": (width,)}
    extra: dict[str, tuple[int, ...]] = {}
    for layer in range(n_layers):
        block = f"blk.{layer}"
        tensors |= {
            f"{block}.attn_norm": (width,),
            f"{block}.ssm_in": (ROWS, width),
            f"{block}.ssm_conv1d": (inner, 4),
            f"{block}.ssm_out": (ROWS, inner),
        }
        if second:
            tensors[f"{block}.ssm_norm"] = (n_groups, inner // n_groups)
        else:
            tensors |= {f"{block}.ssm_x": (ROWS, inner), f"{block}.ssm_dt": (ROWS, rank)}
        extra |= {
            f"{block}.ssm_a": (rank, 1) if second else (inner, 16),
            f"{block}.ssm_conv1d.bias": (inner,),
        }
    if second:
        keys["ssm.group_count"] = n_groups
    if not tied:
        tensors["output"] = (8, width)
    return _model("mamba2" if second else "mamba", keys, tensors, extra)


def _model(architecture, keys, weights, extra) -> Model:
    metadata = {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in keys.items()}
    return Model(metadata, {f"{name}.weight": shape for name, shape in weights.items()} | (extra or {}))
