"""LLaMA, Mistral, Qwen2 and Qwen3.

Hugging Face rotates the features (i, i + half) of a head, GGUF's `llama` the features (2i, 2i + 1): so the
rows of q and k, and their biases, change places within each head. Qwen's keep theirs, as GGUF's `qwen2` and
`qwen3` rotate like them.

    row of q in GGUF    0  1  2  3  4 ...  of a head of 8
    row of q here       0  4  1  5  2 ...

Scaled rotary positions: `linear` and `yarn` are metadata; Llama 3's scheme becomes the tensor
rope_freqs.weight, one divisor of the frequency for each pair: 1 for short wavelengths, the factor for long
ones, between them mixed.

Sources: Touvron et al. 2023, arXiv:2302.13971; Peng et al. 2023, arXiv:2309.00071 (YaRN); Grattafiori et al.
2024, arXiv:2407.21783, and `_compute_llama3_parameters` in transformers; GGUF's tensor names.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.convert.checkpoint import Checkpoint
from pipeline.convert.config import Config
from pipeline.convert.plan import EMBEDDING, OUTPUT, Plan, Slot, Target, bind, rows_of_embedding, tie

_NAMES = {  # architecture: general.architecture
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def plan_llama(checkpoint: Checkpoint, architecture: str) -> Plan:
    """The plan of a checkpoint of LLaMA or a relative.

    Raises:
        ModelError: config.json contradicts itself or the tensors, or asks for what GGUF cannot say.
    """
    config, name = checkpoint.config, _NAMES[architecture]
    config.expect("hidden_act", values=["silu", "swish"], why="GGUF's models of this kind have SiLU")
    warnings = _attention_window(config)
    width, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    n_heads = config.integer("num_attention_heads")
    n_kv_heads = config.integer("num_key_value_heads", default=n_heads)
    if config.get("head_dim") is None and width % n_heads:
        raise config.refusal(f"hidden_size = {width} does not divide by num_attention_heads = {n_heads}")
    head = config.integer("head_dim", default=width // n_heads)
    if n_heads % n_kv_heads:
        raise config.refusal(f"{n_heads} heads do not divide by num_key_value_heads = {n_kv_heads}")
    ff, n_vocab = config.integer("intermediate_size"), config.integer("vocab_size")
    context = config.integer("max_position_embeddings")
    slots = _slots(name, width, n_heads, n_kv_heads, head, ff, n_vocab)
    targets = bind(checkpoint, slots, n_layers, ignored=r"\.rotary_emb\.inv_freq$")
    tied = tie(targets, checkpoint)
    keys: dict[str, Any] = {
        "vocab_size": n_vocab,
        "context_length": context,
        "embedding_length": width,
        "block_count": n_layers,
        "feed_forward_length": ff,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.real("rms_norm_eps", default=1e-6),
        "rope.dimension_count": head,
    }
    if head * n_heads != width:
        keys |= {"attention.key_length": head, "attention.value_length": head}
    scaling, factors = _rope(config, head, context)
    if factors is not None:
        rope = Target("rope_freqs.weight", factors.shape, values=factors)
        targets = {EMBEDDING: targets.pop(EMBEDDING), rope.name: rope, **targets}
    return Plan(
        architecture=name,
        metadata={f"{name}.{key}": value for key, value in (keys | scaling).items()},
        targets=list(targets.values()),
        n_rows=rows_of_embedding(targets),
        n_vocab=n_vocab,
        tied=tied,
        warnings=warnings,
    )


def rotary_order(n_heads: int, head: int) -> NDArray[np.int64]:
    """(n_heads * head,): the row of Hugging Face's q or k that each row of GGUF's is."""
    pairs = np.arange(head).reshape(2, head // 2).T.reshape(-1)
    return (np.arange(n_heads)[:, None] * head + pairs).reshape(-1)


def llama3_factors(
    base: float, width: int, factor: float, low: float, high: float, original_context: int
) -> NDArray[np.float32]:
    """(width / 2,): the divisor of each pair's frequency in Llama 3's scaling.

    Args:
        base: rope_theta.
        width: rotated features of a head.
        factor, low, high, original_context: factor, low_freq_factor, high_freq_factor and
            original_max_position_embeddings of the config.
    """
    turns = original_context * base ** (-np.arange(0, width, 2) / width) / (2 * math.pi)  # in the old context
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)  # of the frequency that stays
    return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)


def _slots(
    name: str, width: int, n_heads: int, n_kv_heads: int, head: int, ff: int, n_vocab: int
) -> list[Slot]:
    layer, block = "model.layers.{}", "blk.{}"
    slots = [
        Slot(EMBEDDING, "model.embed_tokens.weight", (n_vocab, width), is_matrix=True),
        Slot(OUTPUT, "lm_head.weight", (n_vocab, width), is_matrix=True, is_optional=True),
        Slot("output_norm.weight", "model.norm.weight", (width,)),
        Slot(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", (width,)),
    ]
    for short, rows, columns, heads in (
        ("q", n_heads * head, width, n_heads),
        ("k", n_kv_heads * head, width, n_kv_heads),
        ("v", n_kv_heads * head, width, 0),
        ("o", width, n_heads * head, 0),
    ):
        there = f"{block}.attn_{'output' if short == 'o' else short}"
        here = f"{layer}.self_attn.{short}_proj"
        order = rotary_order(heads, head) if heads and name == "llama" else None
        slots.append(Slot(f"{there}.weight", f"{here}.weight", (rows, columns), is_matrix=True, order=order))
        if name == "llama" or (name == "qwen2" and short != "o"):
            change = None if order is None else _in_order(order)
            slots.append(
                Slot(f"{there}.bias", f"{here}.bias", (rows,), is_optional=name == "llama", change=change)
            )
    if name == "qwen3":
        for short in "qk":
            slots.append(
                Slot(f"{block}.attn_{short}_norm.weight", f"{layer}.self_attn.{short}_norm.weight", (head,))
            )
    slots.append(Slot(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (width,)))
    for short, shape in (("gate", (ff, width)), ("up", (ff, width)), ("down", (width, ff))):
        slots.append(
            Slot(f"{block}.ffn_{short}.weight", f"{layer}.mlp.{short}_proj.weight", shape, is_matrix=True)
        )
    return slots


def _in_order(order: NDArray[np.int64]) -> Any:
    """Entries of a vector, which is one row, in another order."""
    return lambda values: values[:, order]


def _attention_window(config: Config) -> list[str]:
    """Refuses windows that some layers have; one that all have is a limit, and said."""
    if config.get("use_sliding_window", default=False) or "sliding_attention" in config.get(
        "layer_types", default=[]
    ):
        raise config.refusal("sliding attention in some layers cannot be converted")
    window = config.get("sliding_window")
    if window is None or "use_sliding_window" in config.values:
        return []
    if window >= config.integer("max_position_embeddings"):
        return []
    return [f"sliding_window = {window} is lost: beyond {window} tokens, attention reaches back further"]


def _rope(config: Config, head: int, context: int) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Metadata of the rotary positions, and the divisors of Llama 3's scaling."""
    nested = [config.get(key, default={}) for key in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(value, dict) for value in nested):
        raise config.refusal(f"rope_parameters or rope_scaling is no object: {nested}")
    scaling = nested[0] | nested[1]  # since transformers 5 the base is in there too
    base = config.real("rope_theta", default=float(scaling.pop("rope_theta", 10000.0)))
    kind = scaling.pop("rope_type", scaling.pop("type", "default")) or "default"
    scaling.pop("type", None)
    if config.get("partial_rotary_factor", default=scaling.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise config.refusal("partial_rotary_factor is not 1, which cannot be converted")
    keys: dict[str, Any] = {"rope.freq_base": base}
    if kind == "default":
        return keys, None
    inner = Config(config.path, scaling)
    factor = inner.real("factor")
    original = inner.integer("original_max_position_embeddings", default=context)
    if kind == "llama3":
        low, high = inner.real("low_freq_factor"), inner.real("high_freq_factor")
        if high <= low:
            raise config.refusal(f"high_freq_factor = {high} is not above low_freq_factor = {low}")
        return keys, llama3_factors(base, head, factor, low, high, original)
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, None
    if kind == "yarn":
        _expect_papers_yarn(inner, factor)
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
        return keys | {"rope.scaling.original_context_length": original}, None
    raise config.refusal(
        f"rope_scaling of the type {kind!r} cannot be converted; known: default, linear, llama3, yarn"
    )


def _expect_papers_yarn(scaling: Config, factor: float) -> None:
    """Refuses constants of YaRN that GGUF's reader would take to be the paper's."""
    scaling.expect("beta_fast", values=[32, 32.0], why="GGUF has the paper's YaRN")
    scaling.expect("beta_slow", values=[1, 1.0], why="GGUF has the paper's YaRN")
    scaling.expect("truncate", values=[True], why="GGUF has the paper's YaRN")
    for key in ("mscale", "mscale_all_dim"):
        scaling.expect(key, values=[0], why="GGUF has the paper's YaRN")
    said = scaling.get("attention_factor")
    usual = 0.1 * math.log(factor) + 1.0
    if said is not None and not math.isclose(said, usual, rel_tol=1e-6):
        raise scaling.refusal(f"attention_factor = {said} cannot be converted, expected {usual}")
