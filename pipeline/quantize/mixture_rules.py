"""The rules behind the mixtures: a tensor's type by its place in a layer, and the layer's in the model.

Each rule answers None where the mixture's own type will do. Mixtures, thresholds and the odd exceptions are
llama.cpp's; see pipeline/quantize/mixtures.py, also for what is tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.errors import ModelError

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ModelFacts:
    """What of a model types depend on."""

    n_layers: int
    n_grouped: int  # query heads a key/value head
    n_experts: int
    is_70b: (
        bool  # what libllama calls a 70B: attn_v is small there (an eighth of attn_q), more bits are cheap
    )
    is_tied: bool  # the embedding is the output layer too
    n_values: int  # attn_v tensors
    has_imatrix: bool


class TensorFacts(NamedTuple):
    """What of a tensor its type depends on, beside its columns."""

    name: str
    shape: tuple[int, ...]  # NumPy's order
    part: str  # see `part_of`
    n_before: int  # tensors of the same part in front of it, in libllama's order


_PARTS = {  # in the order of precedence
    "output": re.compile(r"^output\.weight$"),
    "token_embd": re.compile(r"^(per_layer_)?token_embd\.weight$"),
    "attn_v": re.compile(r"attn_(v|qkv|kv_b)\.weight"),
    "attn_k": re.compile(r"attn_k\.weight"),
    "attn_output": re.compile(r"attn_output\.weight"),
    "ffn_down": re.compile(r"ffn_down"),  # of experts too
}


def part_of(name: str) -> str:
    """What of a layer a tensor is, as far as rules ask; "" for the rest."""
    return next((part for part, pattern in _PARTS.items() if pattern.search(name)), "")


def layer_of(name: str) -> int:
    """The number behind "blk.", or -1."""
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else -1


def wanted_type(mixture: str, default: str, tensor: TensorFacts, model: ModelFacts) -> str:
    """The type of a quantized tensor of whole blocks.

    Args:
        mixture: its name.
        default: the mixture's type for tensors that no rule names.

    Raises:
        ModelError: a feed-forward tensor of a model with experts whose name gives no layer of the model.
    """
    if default in FLOATS:
        return default
    if tensor.part == "output" or (tensor.part == "token_embd" and model.is_tied):
        return "Q8_0" if mixture in ("Q8_0", "MXFP4_MOE") else "Q6_K"
    if mixture == "MXFP4_MOE":
        return "MXFP4" if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else "Q8_0"  # experts, others
    rule = _RULES.get(tensor.part)
    type_ = (rule(mixture, tensor, model) if rule else None) or default
    if tensor.part == "attn_v" and model.is_70b and type_ in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return type_


def type_that_fits(type_: str, columns: int) -> str:
    """The type itself, or the one that stands in for it in rows of so many columns."""
    if type_ in FLOATS or columns % 256 == 0:
        return type_
    return _IN_BLOCKS_OF_32.get(type_, type_) if columns % 32 == 0 else "F16"


_IN_BLOCKS_OF_32 = {  # types of 256-weight blocks -> what holds rows that do not divide by 256
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def _token_embd(mixture: str, tensor: TensorFacts, model: ModelFacts) -> str | None:
    return "Q4_K" if mixture in ("TQ1_0", "TQ2_0") else None


def _attn_v(mixture: str, tensor: TensorFacts, model: ModelFacts) -> str | None:
    if model.n_experts == 8:
        return "Q8_0"  # small beside eight experts
    is_small = model.n_grouped >= 4
    match mixture:
        case "Q2_K":
            return "Q4_K" if is_small else "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if is_small else None
        case "Q3_K_M":
            return "Q5_K" if tensor.n_before < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S":
            return "Q5_K" if tensor.n_before < 4 else None
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if _deserves_more_bits(tensor.n_before, model.n_values) else None
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if is_small else None
    return None


def _attn_k(mixture: str, tensor: TensorFacts, model: ModelFacts) -> str | None:
    return "Q8_0" if model.n_experts == 8 else None


_ATTN_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
_BUMPED_BESIDE_8_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")


def _attn_output(mixture: str, tensor: TensorFacts, model: ModelFacts) -> str | None:
    if model.n_experts == 8:
        return "Q5_K" if mixture in _BUMPED_BESIDE_8_EXPERTS else None
    return _ATTN_OUTPUT.get(mixture)


def _ffn_down(mixture: str, tensor: TensorFacts, model: ModelFacts) -> str | None:
    layer, n_layers = _ffn_layer(tensor, model), model.n_layers
    is_early = layer < n_layers // 8
    match mixture:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if is_early else None
        case "Q3_K_M":
            return "Q5_K" if layer < n_layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S":
            return "Q5_K" if is_early else None
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if _deserves_more_bits(layer, n_layers) else None
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if is_early and not model.has_imatrix else None
        case "Q4_0" | "Q5_0":  # an imatrix alone can go wrong in the first layers
            return f"{mixture[:-1]}1" if is_early and model.has_imatrix else None
    return None


def _ffn_layer(tensor: TensorFacts, model: ModelFacts) -> int:
    """By counting; where there are experts, of which a layer may have several stacks, by the name."""
    if model.n_experts <= 1:
        return tensor.n_before
    layer = layer_of(tensor.name)
    if not 0 <= layer < model.n_layers:
        raise ModelError(
            f"tensor {tensor.name!r}: expected 'blk.N.' in front, N less than the model's {model.n_layers} "
            "layers: where there are experts its type depends on N",
            "is block_count in the metadata right?",
        )
    return layer


def _deserves_more_bits(layer: int, n_layers: int) -> bool:
    """The first eighth of the layers, the last, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


_RULES: dict[str, Callable[[str, TensorFacts, ModelFacts], str | None]] = {
    "token_embd": _token_embd,
    "attn_v": _attn_v,
    "attn_k": _attn_k,
    "attn_output": _attn_output,
    "ffn_down": _ffn_down,
}
