"""Mamba, Mamba-2 and FalconMamba, as Hugging Face and as the original repository name and nest things.

    config                      GGUF                          checkpoint's shape
    hidden_size, d_model        embedding_length              E inner_size, N state_size, W conv_kernel,
    num_hidden_layers, n_layer  block_count                   R time_step_rank, D embedding_length
    intermediate_size, d_inner  <arch>.ssm.inner_size         in_proj (2E, D), conv1d (E, 1, W),
    state_size, d_state         <arch>.ssm.state_size         x_proj (R + 2N, E), dt_proj (E, R),
    conv_kernel, d_conv         <arch>.ssm.conv_kernel        A_log (E, N), D (E,), out_proj (D, E)
    time_step_rank, dt_rank     mamba.ssm.time_step_rank
    num_heads                   mamba2.ssm.time_step_rank     Mamba-2, H heads, G groups:
    n_groups, ngroups           mamba2.ssm.group_count        in_proj (2E + 2GN + H, D), norm (E,),
                                                              conv1d (E + 2GN, 1, W), dt_bias, A_log, D (H,)

What is done to the weights: A = -exp(A_log), so that a step decays by exp(A dt) without a second exponential;
conv1d loses its axis of 1; Mamba-2's A and D get one, and its norm is split by groups. FalconMamba norms dt,
B and C without weights (`mamba.ssm.dt_b_c_rms`). Vocabularies are padded to a multiple, of 8 for Mamba and of
16 for Mamba-2 where the config does not say: by rows of zeros, which are part of the softmax.

Sources: Gu and Dao 2023, arXiv:2312.00752; Dao and Gu 2024, arXiv:2405.21060; Zuo et al. 2024,
arXiv:2410.05355; the defaults of https://github.com/state-spaces/mamba; llama.cpp's tensor names and keys.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.convert.checkpoint import Checkpoint
from pipeline.convert.config import Config
from pipeline.convert.plan import EMBEDDING, OUTPUT, Plan, Slot, bind, pad_rows, rows_of_embedding, tie

_CONTEXT = 1 << 20  # there is no longest context; llama.cpp's files say this
_LOOSE = (
    "in_proj|conv1d|x_proj|dt_proj|out_proj|A_log|D|dt_bias"  # of a mixer, with or without its name in front
)


def plan_mamba(checkpoint: Checkpoint, architecture: str) -> Plan:
    """The plan of a Mamba or FalconMamba checkpoint.

    Raises:
        ModelError: config.json contradicts itself or the tensors, or asks for what GGUF cannot say.
    """
    config = checkpoint.config
    _refuse_switches(config)
    warnings: list[str] = []
    width, n_layers = config.integer("hidden_size", "d_model"), config.integer("num_hidden_layers", "n_layer")
    inner = _inner_size(checkpoint, width, warnings)
    state, kernel = config.integer("state_size", "d_state", default=16), _kernel(config)
    rank = -(-width // 16)
    if config.get("time_step_rank", "dt_rank") != "auto":
        rank = config.integer("time_step_rank", "dt_rank", default=rank)
    eps = _epsilon(config)
    if architecture == "FalconMambaForCausalLM":
        inside = config.real("mixer_rms_eps", default=1e-6)
        if inside != eps:
            warnings.append(
                f"mixer_rms_eps = {inside:g} is lost: GGUF has one epsilon for all norms, {eps:g}"
            )
    mixer, block = "backbone.layers.{}.mixer", "blk.{}"
    slots = [
        *_outside(config, width),
        Slot(f"{block}.attn_norm.weight", "backbone.layers.{}.norm.weight", (width,)),
        Slot(f"{block}.ssm_in.weight", f"{mixer}.in_proj.weight", (2 * inner, width), is_matrix=True),
        Slot(f"{block}.ssm_conv1d.weight", f"{mixer}.conv1d.weight", (inner, 1, kernel), (inner, kernel)),
        Slot(f"{block}.ssm_conv1d.bias", f"{mixer}.conv1d.bias", (inner,), zeros=_no_conv_bias(config)),
        Slot(f"{block}.ssm_x.weight", f"{mixer}.x_proj.weight", (rank + 2 * state, inner), is_matrix=True),
        Slot(f"{block}.ssm_dt.weight", f"{mixer}.dt_proj.weight", (inner, rank), is_matrix=True),
        Slot(f"{block}.ssm_dt.bias", f"{mixer}.dt_proj.bias", (inner,)),
        Slot(f"{block}.ssm_a", f"{mixer}.A_log", (inner, state), change=_negative_exp),
        Slot(f"{block}.ssm_d", f"{mixer}.D", (inner,)),
        Slot(f"{block}.ssm_out.weight", f"{mixer}.out_proj.weight", (width, inner), is_matrix=True),
    ]
    keys = {
        **_shape_keys(width, n_layers, eps),
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
        "ssm.dt_b_c_rms": architecture == "FalconMambaForCausalLM",
    }
    return _finish(checkpoint, "mamba", slots, n_layers, keys, 8, warnings)


def plan_mamba2(checkpoint: Checkpoint, architecture: str) -> Plan:
    """The plan of a Mamba-2 checkpoint; see `plan_mamba`."""
    config = checkpoint.config
    _refuse_switches(config)
    limit = config.get("time_step_limit", "dt_limit", default=[0.0, float("inf")])
    if list(limit) != [0.0, float("inf")]:
        raise config.refusal(f"time_step_limit = {limit!r} cannot be converted, expected [0, Infinity]")
    if "ssm_cfg" in config.values:  # transformers wrote the key, and did not heed it
        config.expect("norm_before_gate", values=[False], why="GGUF's Mamba-2 norms behind the gate")
    config.expect("rmsnorm", values=[True], why="GGUF's Mamba-2 has a norm behind the gate")
    config.expect("D_has_hdim", values=[False], why="GGUF's Mamba-2 has one D a head")
    warnings: list[str] = []
    width, n_layers = config.integer("hidden_size", "d_model"), config.integer("num_hidden_layers", "n_layer")
    inner = _inner_size(checkpoint, width, warnings)
    config.expect("d_ssm", values=[inner], why="parts of Mamba-2 without a state space are not in GGUF")
    head = config.integer("head_dim", "headdim", default=64)
    n_heads = config.integer("num_heads", default=max(1, inner // head))
    if n_heads * head != inner:
        raise config.refusal(
            f"{n_heads} heads of head_dim = {head} are not the {inner} of expand x hidden_size"
        )
    state, kernel = config.integer("state_size", "d_state", default=128), _kernel(config)
    n_groups = config.integer("n_groups", "ngroups", default=1)
    if n_heads % n_groups:
        raise config.refusal(f"{n_heads} heads do not divide by n_groups = {n_groups}")
    rows = inner + 2 * n_groups * state
    mixer, block = "backbone.layers.{}.mixer", "blk.{}"
    slots = [
        *_outside(config, width),
        Slot(f"{block}.attn_norm.weight", "backbone.layers.{}.norm.weight", (width,)),
        Slot(
            f"{block}.ssm_in.weight",
            f"{mixer}.in_proj.weight",
            (inner + rows + n_heads, width),
            is_matrix=True,
        ),
        Slot(f"{block}.ssm_conv1d.weight", f"{mixer}.conv1d.weight", (rows, 1, kernel), (rows, kernel)),
        Slot(f"{block}.ssm_conv1d.bias", f"{mixer}.conv1d.bias", (rows,), zeros=_no_conv_bias(config)),
        Slot(f"{block}.ssm_dt.bias", f"{mixer}.dt_bias", (n_heads,)),
        Slot(f"{block}.ssm_a", f"{mixer}.A_log", (n_heads,), (n_heads, 1), change=_negative_exp),
        Slot(f"{block}.ssm_d", f"{mixer}.D", (n_heads,), (n_heads, 1)),
        Slot(f"{block}.ssm_norm.weight", f"{mixer}.norm.weight", (inner,), (n_groups, inner // n_groups)),
        Slot(f"{block}.ssm_out.weight", f"{mixer}.out_proj.weight", (width, inner), is_matrix=True),
    ]
    keys = {
        **_shape_keys(width, n_layers, _epsilon(config)),
        "attention.head_count": n_heads,  # llama.cpp b9190 takes ssm_in's shape from it
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": n_heads,
        "ssm.group_count": n_groups,
    }
    return _finish(checkpoint, "mamba2", slots, n_layers, keys, 16, warnings)


def _finish(
    checkpoint: Checkpoint,
    name: str,
    slots: list[Slot],
    n_layers: int,
    keys: dict[str, Any],
    multiple: int,
    warnings: list[str],
) -> Plan:
    """Binds the tensors, ties the output layer and pads the vocabulary."""
    config = checkpoint.config
    n_vocab = config.integer("vocab_size")
    multiple = config.integer("pad_vocab_size_multiple", default=multiple)
    padded = -(-n_vocab // multiple) * multiple
    n_rows = _rows_of(checkpoint, n_vocab, padded)
    slots = [_with_rows(slot, n_rows) if slot.name in (EMBEDDING, OUTPUT) else slot for slot in slots]
    targets = bind(checkpoint, slots, n_layers, canonical=_canonical)
    tied = tie(targets, checkpoint)
    if n_rows < padded:
        warnings.append(
            f"vocabulary padded from {n_rows:,} to {padded:,}, a multiple of {multiple}, by rows of zeros, "
            "which take part in the softmax"
        )
        for output in targets.keys() & {EMBEDDING, OUTPUT}:
            targets[output] = pad_rows(targets[output], padded)
    return Plan(
        architecture=name,
        metadata={f"{name}.{key}": value for key, value in keys.items()},
        targets=list(targets.values()),
        n_rows=rows_of_embedding(targets),
        n_vocab=padded,
        tied=tied,
        warnings=warnings,
    )


def _rows_of(checkpoint: Checkpoint, n_vocab: int, padded: int) -> int:
    """Rows of the embedding: `n_vocab`, or `padded` already; what else it has is refused when it is bound."""
    names = {_canonical(name): tensor for name, tensor in checkpoint.tensors.items()}
    embedding = names.get("backbone.embeddings.weight")
    return padded if embedding is not None and embedding.shape[0] == padded else n_vocab


def _with_rows(slot: Slot, n_rows: int) -> Slot:
    return Slot(
        slot.name, slot.source, (n_rows, *slot.shape[1:]), is_matrix=True, is_optional=slot.is_optional
    )


def _outside(config: Config, width: int) -> list[Slot]:
    """What is not in a layer."""
    n_vocab = config.integer("vocab_size")
    return [
        Slot(EMBEDDING, "backbone.embeddings.weight", (n_vocab, width), is_matrix=True),
        Slot(OUTPUT, "lm_head.weight", (n_vocab, width), is_matrix=True, is_optional=True),
        Slot("output_norm.weight", "backbone.norm_f.weight", (width,)),
    ]


def _canonical(name: str) -> str:
    """A tensor's name as Hugging Face's MambaForCausalLM has it."""
    name = re.sub(r"^model\.(?=backbone\.|lm_head\.)", "", name)  # Codestral Mamba
    name = re.sub(r"^model\.", "backbone.", name)
    name = re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", name)  # the original
    return re.sub(rf"^(backbone\.layers\.\d+)\.(?=(?:{_LOOSE})(?:\.|$))", r"\1.mixer.", name)


def _inner_size(checkpoint: Checkpoint, width: int, warnings: list[str]) -> int:
    """The inner width, which config.json says twice; where FalconMamba's own errs, the tensors decide."""
    config = checkpoint.config
    expand = config.get("expand")
    by_expand = int((2 if expand is None else config.real("expand")) * width)
    inner = config.integer("intermediate_size", "d_inner", default=by_expand)
    if expand is not None and inner != by_expand:
        what = f"intermediate_size = {inner}, but expand x hidden_size = {expand} x {width} = {by_expand}"
        if config.get("model_type") != "falcon_mamba":
            raise config.refusal(what)
        warnings.append(f"{config.path.name}: {what}; took {inner}, which the tensors' shapes must confirm")
    if inner != 2 * width:
        warnings.append(f"the inner size is {inner}, not twice {width}: llama.cpp will not load the file")
    return inner


def _kernel(config: Config) -> int:
    return config.integer("conv_kernel", "d_conv", default=4)


def _epsilon(config: Config) -> float:
    return config.real("layer_norm_epsilon", "rms_norm_eps", "norm_epsilon", default=1e-5)


def _no_conv_bias(config: Config) -> bool:
    return not config.flag("use_conv_bias", "conv_bias", default=True)


def _shape_keys(width: int, n_layers: int, eps: float) -> dict[str, Any]:
    """Keys that llama.cpp wants of every model."""
    return {
        "context_length": _CONTEXT,
        "embedding_length": width,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": n_layers,
        "attention.layer_norm_rms_epsilon": eps,
    }


def _refuse_switches(config: Config) -> None:
    """Raises ModelError for settings that GGUF's Mamba has no place for."""
    config.expect("hidden_act", values=["silu", "swish"], why="GGUF's Mamba has SiLU")
    config.expect("rms_norm", values=[True], why="GGUF's Mamba has RMS norms")
    config.expect("use_bias", "bias", values=[False], why="GGUF's Mamba has no biases in its projections")
    config.expect("d_intermediate", values=[0], why="GGUF's Mamba has no feed-forward layers")
    config.expect("attn_layer_idx", values=[[]], why="GGUF's Mamba has no attention layers")


def _negative_exp(a_log: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # the writer refuses infinite weights and says where they are
        return -np.exp(a_log)
