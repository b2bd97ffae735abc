"""Writes GGUF files for tests, byte by byte and without the gguf package, so that they can be broken ones.

    write_gguf(path, {"general.architecture": "llama"}, {"w": ("F32", (2, 32), bytes(256))})
    tiny_llama(path, type_name="Q4_1")                 # a whole model, which llama.cpp runs too
    expand_to_f32("model.gguf", "model-f32.gguf")      # the same model with every weight decoded

`build_gguf` also says where each field lies, which is what the fuzz tests change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import engine
from engine.ggml_types import by_name

VALUE_TYPES = {  # name -> number in the file, NumPy type
    "u8": (0, np.dtype("u1")),
    "i8": (1, np.dtype("i1")),
    "u16": (2, np.dtype("<u2")),
    "i16": (3, np.dtype("<i2")),
    "u32": (4, np.dtype("<u4")),
    "i32": (5, np.dtype("<i4")),
    "f32": (6, np.dtype("<f4")),
    "bool": (7, np.dtype("?")),
    "u64": (10, np.dtype("<u8")),
    "i64": (11, np.dtype("<i8")),
    "f64": (12, np.dtype("<f8")),
}
STRING, ARRAY = 8, 9
_NAMES = {dtype: name for name, (_, dtype) in VALUE_TYPES.items()}

Items = Mapping[str, Any] | Iterable[tuple[str, Any]]  # pairs, where a test wants one key twice


class Typed(NamedTuple):
    """A metadata value of a chosen type: Typed("u8", 3), Typed("f64", [1.5, 2.5]), Typed("str", [])."""

    type: str
    value: Any


class Field(NamedTuple):
    """Where a field lies; `kind`: version count length type value n_dims dim offset text items."""

    kind: str
    what: str
    offset: int
    size: int


@dataclass
class Built:
    """A file in memory: its bytes, its fields in file order, where its data begins."""

    data: bytearray = field(default_factory=bytearray)
    fields: list[Field] = field(default_factory=list)
    data_offset: int = 0

    def put(self, kind: str, what: str, type_: str, value: Any) -> None:
        """Appends a number."""
        self._put_raw(kind, what, np.array(value, VALUE_TYPES[type_][1]).tobytes())

    def put_text(self, what: str, text: str | bytes) -> None:
        """Appends a string behind its length."""
        raw = text.encode() if isinstance(text, str) else text
        self._put_raw("length", what, len(raw).to_bytes(8, "little"))
        self._put_raw("text", what, raw)

    def put_value(self, key: str, value: Any) -> None:
        """Appends a value behind its type; see `write_gguf`."""
        type_, value = value if isinstance(value, Typed) else (None, value)
        if isinstance(value, (list, tuple, np.ndarray)):
            self.put("type", key, "u32", ARRAY)
            self._put_array(key, value, type_)
        elif isinstance(value, (str, bytes)):
            self.put("type", key, "u32", STRING)
            self.put_text(key, value)
        else:
            type_ = type_ or _scalar_type(value)
            self.put("type", key, "u32", VALUE_TYPES[type_][0])
            self.put("value", key, type_, value)

    def put_tensor(self, name: str | bytes, type_id: int, shape: tuple[int, ...], offset: int) -> None:
        """Appends a row of the tensor table; `shape` in NumPy's order."""
        what = str(name)
        self.put_text(what, name)
        self.put("n_dims", what, "u32", len(shape))
        for dim in reversed(shape):
            self.put("dim", what, "u64", dim)
        self.put("type", what, "u32", type_id)
        self.put("offset", what, "u64", offset)

    def pad(self, alignment: int) -> None:
        """Appends zeros up to a multiple of the alignment."""
        self.data += bytes(-len(self.data) % alignment)

    def borders(self) -> list[int]:
        """Where a field begins or ends, where the data begins, the file's end; rising."""
        ends = {at for f in self.fields for at in (f.offset, f.offset + f.size)}
        return sorted(ends | {self.data_offset, len(self.data)})

    def _put_array(self, key: str, items: Any, type_: str | None) -> None:
        first = items[0] if len(items) else None
        if isinstance(first, (list, tuple, np.ndarray)):
            self._put_array_head(key, ARRAY, len(items))
            for item in items:
                self._put_array(key, item, type_)
        elif type_ == "str" or isinstance(first, (str, bytes)):
            self._put_array_head(key, STRING, len(items))
            for item in items:
                self.put_text(key, item)
        else:
            if type_ is None:
                is_array = isinstance(items, np.ndarray)
                type_ = _NAMES[items.dtype] if is_array else _scalar_type(first).replace("u32", "i32")
            number, dtype = VALUE_TYPES[type_]
            self._put_array_head(key, number, len(items))
            self._put_raw("items", key, np.asarray(items, dtype).tobytes())

    def _put_array_head(self, key: str, type_id: int, count: int) -> None:
        self.put("type", key, "u32", type_id)
        self.put("count", key, "u64", count)

    def _put_raw(self, kind: str, what: str, raw: bytes) -> None:
        self.fields.append(Field(kind, what, len(self.data), len(raw)))
        self.data += raw


def build_gguf(metadata: Items, tensors: Items, *, version: int = 3) -> Built:
    """A file in memory; arguments as for `write_gguf`."""
    keys, rows = list(_pairs(metadata)), list(_pairs(tensors))
    alignment = next((_plain(value) for key, value in keys if key == "general.alignment"), 32)
    alignment = alignment if isinstance(alignment, int) and alignment > 0 else 32
    built = Built(bytearray(b"GGUF"))
    built.put("version", "", "u32", version)
    built.put("count", "tensors", "u64", len(rows))
    built.put("count", "keys", "u64", len(keys))
    for key, value in keys:
        built.put_text(key, key)
        built.put_value(key, value)
    offset = 0
    for name, (type_name, shape, raw) in rows:
        built.put_tensor(name, by_name(type_name).id, shape, offset)
        offset += len(raw) + -len(raw) % alignment
    built.pad(alignment)
    built.data_offset = len(built.data)
    for _, (_, _, raw) in rows:
        built.data += raw
        built.pad(alignment)
    return built


def write_gguf(path: str | Path, metadata: Items, tensors: Items, *, version: int = 3) -> Path:
    """Writes a GGUF file.

    Args:
        metadata: key -> bool, int (u32, or as it needs), float (f32), str, bytes, a list of one kind (ints:
            i32), a NumPy array, lists of lists, or Typed. `general.alignment` is obeyed.
        tensors: name -> (type's name, shape in NumPy's order, bytes).
    """
    path = Path(path)
    path.write_bytes(build_gguf(metadata, tensors, version=version).data)
    return path


def encode(values: NDArray[np.float32], type_name: str, rng: np.random.Generator) -> bytes:
    """Weights in a tensor type: by NumPy or the gguf package, else random blocks that spread as widely."""
    if type_name in _PLAIN:
        return values.astype(_PLAIN[type_name]).tobytes()
    import gguf

    type_ = gguf.GGMLQuantizationType[type_name]
    try:
        return gguf.quants.quantize(values, type_).tobytes()
    except NotImplementedError:
        pass
    ggml = by_name(type_name)
    blocks = rng.integers(0, 256, (values.size // ggml.block_size, ggml.block_bytes), np.uint8)
    spread = rng.uniform(0.5, 1.5, len(blocks))

    def set_scales(scale: float) -> None:
        if type_name == "NVFP4":  # four bytes, E4M3
            scales = gguf.quants.NVFP4.fp32_to_ue4m3((scale * spread).astype(np.float32))
            blocks[:, :4] = scales[:, None]
        elif type_name == "IQ1_M":  # a half in the upper nibbles of four 16-bit words
            half = (scale * spread).astype("<f2").view("<u2")[:, None]
            blocks[:, 49::2] = blocks[:, 49::2] & 15 | (half >> np.arange(0, 16, 4) & 15) << 4
        for offset, weight in _HALVES.get(type_name, ()):
            blocks[:, offset : offset + 2] = (scale * weight * spread).astype("<f2").view("u1").reshape(-1, 2)

    set_scales(1.0)
    set_scales(float(values.std() / gguf.quants.dequantize(blocks, type_).std()))
    return blocks.tobytes()


_PLAIN = {"F32": "<f4", "F16": "<f2", "I8": "i1"}
_HALVES = {  # where a block's float16 scales lie, and their sizes that make the weights' mean about 0
    "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
    **dict.fromkeys(["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"], ((0, 1.0),)),
    "IQ4_NL": ((0, 1.0),),
    "IQ4_XS": ((0, 1.0),),
}


def tiny_llama(
    path: str | Path,
    *,
    seed: int = 0,
    n_layers: int = 2,
    width: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_width: int | None = None,
    ff: int = 96,
    vocab: int = 300,
    tied: bool = True,
    type_name: str = "F32",
    embedding_type: str | None = None,
    context: int = 128,
    architecture: str = "llama",
    extra: Mapping[str, NDArray[np.float32]] | None = None,
    **overrides: Any,
) -> Path:
    """Writes a whole LLaMA model with random weights and a byte-level BPE tokenizer; llama.cpp runs it too.

    Logits spread by a few nats. Norms are F32, other tensors `type_name` (the embedding and the head
    `embedding_type`, where given), `extra` ones F32. `overrides` are metadata, e.g.
    **{"llama.rope.freq_base": 5e5}; None leaves one out. Another `architecture` takes the place of `llama` in
    keys.
    """
    rng = np.random.default_rng(seed)
    head = head_width or width // n_heads
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": f"tiny llama, seed {seed}",
        "llama.block_count": n_layers,
        "llama.context_length": context,
        "llama.embedding_length": width,
        "llama.feed_forward_length": ff,
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": head,
        "llama.vocab_size": vocab,
    }
    if head * n_heads != width:
        metadata |= {"llama.attention.key_length": head, "llama.attention.value_length": head}
    metadata |= byte_level_vocabulary(vocab, seed) | overrides

    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

    def matrix(name: str, rows: int, columns: int, gain: float, type_: str = type_name) -> None:
        values = rng.normal(0.0, gain / columns**0.5, (rows, columns)).astype(np.float32)
        tensors[f"{name}.weight"] = (type_, (rows, columns), encode(values, type_, rng))

    def norm(name: str) -> None:
        values = rng.normal(1.0, 0.1, width).astype(np.float32)
        tensors[f"{name}.weight"] = ("F32", (width,), values.tobytes())

    matrix("token_embd", vocab, width, 2.0, embedding_type or type_name)
    for layer in range(n_layers):
        norm(f"blk.{layer}.attn_norm")
        matrix(f"blk.{layer}.attn_q", n_heads * head, width, 1.5)
        matrix(f"blk.{layer}.attn_k", n_kv_heads * head, width, 1.5)
        matrix(f"blk.{layer}.attn_v", n_kv_heads * head, width, 1.0)
        matrix(f"blk.{layer}.attn_output", width, n_heads * head, 1.0)
        norm(f"blk.{layer}.ffn_norm")
        matrix(f"blk.{layer}.ffn_gate", ff, width, 1.5)
        matrix(f"blk.{layer}.ffn_up", ff, width, 1.0)
        matrix(f"blk.{layer}.ffn_down", width, ff, 1.0)
    norm("output_norm")
    if not tied:
        matrix("output", vocab, width, 2.0, embedding_type or type_name)
    for name, values in (extra or {}).items():
        tensors[name] = ("F32", values.shape, values.astype("<f4").tobytes())
    metadata = {key.replace("llama.", f"{architecture}.", 1): value for key, value in metadata.items()}
    metadata["general.architecture"] = metadata["general.architecture"].replace("llama", architecture)
    return write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, tensors)


def llama_extra(
    biases: Iterable[str] = (),
    *,
    head_norms: bool = False,
    rope_freqs: Iterable[float] | None = None,
    n_layers: int = 2,
    head_width: int = 16,
) -> dict[str, NDArray[np.float32]]:
    """`extra` of a `tiny_llama` with its 4 heads and 2 kv heads: what relatives of LLaMA have besides."""
    rng = np.random.default_rng(1)
    out = {}
    for layer in range(n_layers):
        for name in biases:
            rows = {"attn_q": 4 * head_width, "attn_output": 64}.get(name, 2 * head_width)
            out[f"blk.{layer}.{name}.bias"] = rng.normal(0.0, 0.3, rows).astype(np.float32)
        for name in ("attn_q_norm", "attn_k_norm") if head_norms else ():
            out[f"blk.{layer}.{name}.weight"] = rng.normal(1.0, 0.1, head_width).astype(np.float32)
    if rope_freqs is not None:
        out["rope_freqs.weight"] = np.array(list(rope_freqs), np.float32)
    return out


def byte_level_vocabulary(size: int, seed: int = 0) -> dict[str, Any]:
    """`tokenizer.ggml.*` of a byte-level BPE: 3 control tokens, 256 bytes, merges (common, then random)."""
    if size < 259:
        raise ValueError(f"{size} tokens, expected at least 259: 3 control tokens and 256 bytes")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2 writes as themselves
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = dict.fromkeys([*control, *(alphabet[byte] for byte in range(256))])
    pool, merges = [alphabet[byte] for byte in (32, *range(97, 123))], []
    common = "Ġ t|h e|Ġ a|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|Ġ o|e n|Ġ c|i t|i s|a n|o r|e s|Ġ b|e d|Ġ f|in g"
    pairs = [tuple(pair.split(" ")) for pair in common.split("|")]
    draws = iter(np.random.default_rng(seed).random((10 * size, 2)).tolist())
    while len(tokens) < size:
        left, right = pairs.pop(0) if pairs else _random_pair(pool, next(draws))
        if left + right in tokens:
            continue
        tokens[left + right] = None
        pool.append(left + right)
        merges.append(f"{left} {right}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [3] * len(control) + [1] * (size - len(control)),
        "tokenizer.ggml.merges": Typed("str", merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _random_pair(pool: list[str], draw: list[float]) -> tuple[str, str]:
    """Any token so far, and a space or a letter."""
    return pool[int(draw[0] * len(pool))], pool[int(draw[1] * 27)]


def expand_to_f32(source: str | Path, target: str | Path) -> Path:
    """Writes a model again with every tensor decoded to F32 (by the gguf package) and the same metadata."""
    import gguf

    target = Path(target)
    with engine.open(source) as file, Path(source).open("rb") as old, target.open("wb") as new:
        built = Built(bytearray(old.read(file.metadata_end)))
        offset = 0
        for tensor in file.tensors.values():
            built.put_tensor(tensor.name, by_name("F32").id, tensor.shape, offset)
            offset += 4 * prod(tensor.shape) + -4 * prod(tensor.shape) % file.alignment
        built.pad(file.alignment)
        new.write(built.data)
        for tensor in file.tensors.values():
            type_ = gguf.GGMLQuantizationType(tensor.type.id)
            rows = tensor.data.reshape(prod(tensor.shape[:-1]), -1)
            step = max(1, (4 << 20) // tensor.shape[-1])  # 16 MB of weights at a time
            for first in range(0, len(rows), step):
                new.write(gguf.quants.dequantize(rows[first : first + step], type_).astype("<f4").tobytes())
            new.write(bytes(-new.tell() % file.alignment))
    return target


def split_gguf(
    source: str | Path,
    folder: str | Path,
    n_parts: int,
    *,
    changes: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Writes a whole model again in parts, `<stem>-00001-of-0000N.gguf`, as llama.cpp's gguf-split does.

    Args:
        changes: rank of a part, from 0 -> metadata to change or add in it; None leaves a split key out.
    """
    paths = []
    with engine.open(source) as file, Path(source).open("rb") as old:
        tensors = list(file.tensors.values())
        head = old.read(file.metadata_end)
        for rank in range(n_parts):
            own = tensors[len(tensors) * rank // n_parts : len(tensors) * (rank + 1) // n_parts]
            alignment = 32 if rank else file.alignment  # only the first part says general.alignment
            keys: dict[str, Any] = {
                "split.no": Typed("u16", rank),
                "split.count": Typed("u16", n_parts),
                "split.tensors.count": Typed("i32", len(tensors)),
            }
            keys |= (changes or {}).get(rank, {})
            keys = {key: value for key, value in keys.items() if value is not None}
            built = Built(bytearray(head[:24] if rank else head))
            built.data[8:16] = len(own).to_bytes(8, "little")
            built.data[16:24] = (len(keys) + (0 if rank else len(file.metadata))).to_bytes(8, "little")
            for key, value in keys.items():
                built.put_text(key, key)
                built.put_value(key, value)
            offset = 0
            for tensor in own:
                built.put_tensor(tensor.name, tensor.type.id, tensor.shape, offset)
                offset += tensor.n_bytes + -tensor.n_bytes % alignment
            built.pad(alignment)
            for tensor in own:
                built.data += tensor.data.tobytes()
                built.pad(alignment)
            paths.append(Path(folder) / f"{Path(source).stem}-{rank + 1:05d}-of-{n_parts:05d}.gguf")
            paths[-1].write_bytes(built.data)
    return paths


def _pairs(items: Items) -> Iterable[tuple[str, Any]]:
    """Pairs of a mapping, or the pairs themselves."""
    return items.items() if isinstance(items, Mapping) else items


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def _scalar_type(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "bool" if value is not None else "i32"
    if isinstance(value, float):
        return "f32"
    if isinstance(value, int):
        return next(name for name in ("u32", "i32", "u64", "i64") if _fits(value, name))
    raise TypeError(f"no GGUF type for {value!r}; wrap it in Typed")


def _fits(value: int, type_: str) -> bool:
    """Whether an integer type holds the value."""
    limits = np.iinfo(VALUE_TYPES[type_][1])
    return int(limits.min) <= value <= int(limits.max)
