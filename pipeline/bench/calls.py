"""What a player is asked to do: decode calls on token ids that are the same for every engine.

    kind         sequences             timed                               counted as tokens
    perplexity   n_seqs windows        everything; the scored half of      n_seqs * n_prompt
                 of n_prompt           each window wants its likelihood
    prompt       n_seqs of n_prompt    everything; the last token of       n_seqs * n_prompt
                                       each sequence wants its logits
    generate     one of n_prompt,      n_generate calls of one token,      n_generate
                 from 0 on             each wants its logits
    batched      n_seqs of n_prompt    n_generate calls of n_seqs tokens,  n_seqs * n_generate
                                       one a sequence, each wants logits

They are what llama-perplexity, llama-bench (`pp`, `tg`) and llama-batched-bench (`TG`) time. The scored half
are the tokens whose next one protocols/windows.py scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

KINDS = ("perplexity", "prompt", "generate", "batched")
READY_TOKENS = 16
_SEED = 20_240_613


@dataclass(frozen=True)
class Vocabulary:
    """What token ids are drawn from; `bos_id` begins every sequence of a model that has one."""

    n_vocab: int
    bos_id: int | None

    def draw(self, n_seqs: int, length: int) -> npt.NDArray[np.int32]:
        """(n_seqs, length) int32 ids, the same ones whenever the same number is asked for."""
        ids = np.random.default_rng(_SEED).integers(0, self.n_vocab, (n_seqs, length), np.int32)
        if self.bos_id is not None:
            ids[:, 0] = self.bos_id
        return ids


@dataclass(frozen=True)
class Call:
    """One decode call.

    Attributes:
        tokens, positions, slots: (T,) int32.
        targets: (T,) int32, the id whose likelihood is wanted after a token, -1 where none is.
        outputs: (T,) bool, tokens whose row of logits has to be computed; where targets are, exactly those.
        timed: False for what only leads up to the measured part.
    """

    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    outputs: npt.NDArray[np.bool_]
    timed: bool = True

    def split(self, limit: int) -> Iterator[Call]:
        """The call as calls of at most `limit` tokens."""
        for at in range(0, self.tokens.size, limit):
            yield self.part(np.s_[at : at + limit], self.timed)

    def part(self, index: Any, timed: bool) -> Call:
        """Some of the tokens, one after the other."""
        return Call(
            self.tokens[index].ravel(),
            self.positions[index].ravel(),
            self.slots[index].ravel(),
            self.targets[index].ravel(),
            self.outputs[index].ravel(),
            timed,
        )


@dataclass(frozen=True)
class Group:
    """Calls on `n_slots` sequences of up to `capacity` positions that begin with an empty cache."""

    n_slots: int
    capacity: int
    calls: list[Call]


@dataclass(frozen=True)
class Workload:
    """One repetition of a kind of work."""

    kind: str
    n_prompt: int
    n_generate: int
    n_seqs: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind}; expected one of {', '.join(KINDS)}")
        floors = {
            "n_prompt": (self.n_prompt, {"perplexity": 3, "prompt": 1}.get(self.kind, 0)),
            "n_generate": (self.n_generate, 1 if self.generates else 0),
            "n_seqs": (self.n_seqs, 1),
        }
        for name, (value, floor) in floors.items():
            if value < floor:
                raise ValueError(
                    f"{name}={value} is too small for kind={self.kind}; expected {floor} or more"
                )
        if self.kind == "generate" and self.n_seqs != 1:
            raise ValueError(f"n_seqs={self.n_seqs} with kind=generate; expected 1, or kind=batched")

    @property
    def generates(self) -> bool:
        """Whether tokens are decoded one by one."""
        return self.kind in ("generate", "batched")

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.n_prompt + (self.n_generate if self.generates else 0)

    @property
    def n_tokens(self) -> int:
        """Tokens that the timed part decodes."""
        return self.n_seqs * (self.n_generate if self.generates else self.n_prompt)

    def groups(self, vocabulary: Vocabulary, batch: int) -> Iterator[Group]:
        """The work as calls of at most `batch` tokens; a batch takes as many whole windows as fit it."""
        ids = vocabulary.draw(self.n_seqs, self.length)
        together = max(1, batch // self.n_prompt) if self.kind == "perplexity" else self.n_seqs
        for first in range(0, self.n_seqs, together):
            part = ids[first : first + together]
            calls = [call for whole in self._calls(part) for call in whole.split(batch)]
            yield Group(len(part), self.length, calls)

    def _calls(self, ids: npt.NDArray[np.int32]) -> Iterator[Call]:
        """The calls on (S, length) ids, however large."""
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        slots = np.broadcast_to(np.arange(ids.shape[0], dtype=np.int32)[:, None], ids.shape)
        targets = np.full(ids.shape, -1, np.int32)
        outputs = np.zeros(ids.shape, np.bool_)
        if self.kind == "perplexity":
            half = self.n_prompt // 2
            targets[:, half:-1] = ids[:, half + 1 :]
            outputs = targets >= 0
        elif self.kind == "prompt":
            outputs[:, -1] = True
        else:
            outputs[:, self.n_prompt :] = True
        whole = Call(ids, positions, slots, targets, outputs)
        if self.n_prompt:
            yield whole.part(np.s_[:, : self.n_prompt], not self.generates)
        for step in range(self.n_prompt, self.length):
            yield whole.part(np.s_[:, step], True)
