"""What a test of the benchmark comes to: its name, and a model's arithmetic and reading in it.

    perplexity  ppl512      names as llama-bench and llama-batched-bench have them; what is timed in each
    prompt      pp512       says pipeline/bench/calls.py
    generate    tg64
    batched     tg64@8

Arithmetic is counted from the shapes: two operations for each weight of a matrix that a token meets, and for
the attention four for each feature of each head and position looked at; norms and activations are well below
one part in a hundred. Bytes are those of the weights, once for each batch; keys and values come on top.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench.calls import Workload
from pipeline.bench.settings import BenchSettings

if TYPE_CHECKING:
    import engine

# `general.file_type`; source: enum llama_ftype of llama.cpp's include/llama.h.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class Case(Workload):
    """One test; see the top of this module."""

    @property
    def name(self) -> str:
        """As the tables have it."""
        if not self.generates:
            return f"{'ppl' if self.kind == 'perplexity' else 'pp'}{self.n_prompt}"
        return f"tg{self.n_generate}" + (f"@{self.n_seqs}" if self.kind == "batched" else "")


def cases(bench: BenchSettings) -> list[Case]:
    """The tests that the settings ask for, in the order in which they are run."""
    made = {
        "perplexity": [Case("perplexity", bench.window, 0, bench.windows)],
        "prompt": [Case("prompt", n, 0, 1) for n in bench.prompt],
        "generate": [Case("generate", 0, n, 1) for n in bench.generate],
        "batched": [
            Case("batched", prompt, generate, seqs)
            for prompt in bench.prompt
            for generate in bench.generate
            for seqs in bench.seqs
        ],
    }
    return [case for kind, found in made.items() if kind in bench.kinds for case in found]


@dataclass(frozen=True)
class Work:
    """A model's matrices, counted.

    Attributes:
        name: the file's, without its ending.
        type: as `general.file_type` says, or the type of most weights.
        n_bytes: of the file, or of all its parts.
        layers, head: weights of the layers' matrices, and of the one that makes logits.
        layers_bytes, head_bytes: what they take in the file.
        attended: features of all heads of all layers.
    """

    name: str
    type: str
    n_bytes: int
    layers: int
    head: int
    layers_bytes: int
    head_bytes: int
    attended: int

    def flop(self, case: Case) -> float:
        """Operations of a repetition's timed part."""
        first = case.n_prompt if case.generates else 0
        timed = case.length - first
        seen = timed * first + timed * (timed + 1) // 2  # positions looked at, over the tokens of a sequence
        n_logits = {"perplexity": timed - 1 - timed // 2, "prompt": 1}.get(case.kind, timed)
        return 2.0 * case.n_seqs * (timed * self.layers + n_logits * self.head + 2 * seen * self.attended)

    def read_bytes(self, case: Case, batch_tokens: int) -> float:
        """Bytes of weights that a repetition's timed part reads when a batch takes so many tokens."""
        if case.generates:
            steps = case.n_generate * math.ceil(case.n_seqs / batch_tokens)
            return float(steps * (self.layers_bytes + self.head_bytes))
        batches = math.ceil(case.n_tokens / batch_tokens)
        heads = batches if case.kind == "perplexity" else 1
        return float(batches * self.layers_bytes + heads * self.head_bytes)


def work_of(file: engine.GGUFFile) -> Work:
    """Counts a model's matrices; a tied one makes logits from its embedding."""
    layers = [t for name, t in file.tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
    head = file.tensors.get("output.weight") or file.tensors["token_embd.weight"]
    queries = [t for name, t in file.tensors.items() if name.endswith(".attn_q.weight")]
    return Work(
        name=Path(file.path).name.removesuffix(".gguf"),
        type=weight_type(file),
        n_bytes=file.n_bytes,
        layers=sum(math.prod(tensor.shape) for tensor in layers),
        head=math.prod(head.shape),
        layers_bytes=sum(tensor.n_bytes for tensor in layers),
        head_bytes=head.n_bytes,
        attended=sum(tensor.shape[0] for tensor in queries),
    )


def weight_type(file: engine.GGUFFile) -> str:
    """The file type that the metadata names, as llama.cpp calls it; else the type of most weights."""
    number = file.metadata.get("general.file_type")
    if isinstance(number, int) and number in FILE_TYPES:
        return FILE_TYPES[number]
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        weights[tensor.type.name] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0] if weights else "?"
