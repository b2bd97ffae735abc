"""llama.cpp's files of a model's logits, 16 bits each: `llama-perplexity --kl-divergence-base FILE`.

    offset 0     char[8] "_logits_"
           8     int32 n_ctx, n_vocab, n_chunk
          20     int32 tokens[n_chunk * n_ctx]        the text's own; a BOS is put in when they are read
    then, window after window, a record for each scored token, n_ctx - 1 - n_ctx // 2 a window
           0     float32 scale, min_log_prob
           8     uint16 q[n_vocab], and one more, 0, where n_vocab is odd

Windows and scored tokens are those of protocol `windows`. All is little-endian. A row of logits l with the
maximum m and S = sum exp(l - m) becomes, in float32,

    lo = max(min l, m - 16)         scale = (m - lo) / 65535        min_log_prob = lo - m - ln S
    q_i = nearest((l_i - lo) / scale) where l_i > lo, else 0

and is read back as ln p_i = scale q_i + min_log_prob.

So tokens more than 16 nats below the most likely one are all raised to 16 below, and the others lie on steps
of up to 2.4e-4 nats. The probabilities read back add up to more than 1, rare targets look likelier than the
model finds them, and the perplexity is too low: 24.4522 in place of 24.4974 for SmolLM2-135M on 8 windows. A
divergence from them has a floor: llama.cpp's own table has 0.00055 for a model against itself. ik_llama.cpp
writes the same layout with 24 in place of 16. Source: examples/perplexity of llama.cpp, build 11434.

Divergences are summed as llama.cpp does, over the tokens with ln p > -16 and without making the base's
probabilities add up to 1, so they can come out a little below 0; but in float64, without rounding between.
"""

from __future__ import annotations

import math
import mmap
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError

Logits = npt.NDArray[np.float32]
Reals = npt.NDArray[np.float64]

MAGIC = b"_logits_"
FORMAT = "16-bit logits"
"""What a base from a file is called in tables and summaries."""
CLIP_NATS = 16
IK_CLIP_NATS = 24
"""ik_llama.cpp's."""

_HEADER = struct.Struct("<8s3i")
_STEPS = 65535
_LEAST_LN_P = -16.0
"""Tokens that are less likely are left out of a divergence."""
_SLACK = 1e-3
_BLOCK = 8192
"""Numbers whose intermediate results stay in the cache of a core: half the time of a whole row at once."""
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
_TAYLOR = [1 / math.factorial(n) for n in range(13, -1, -1)]


def per_window(n_ctx: int) -> int:
    """Scored tokens of a window."""
    return n_ctx - 1 - n_ctx // 2


def record_words(n_vocab: int) -> int:
    """uint16s of a record."""
    return 2 * ((n_vocab + 1) // 2) + 4


def file_bytes(n_ctx: int, n_vocab: int, n_chunk: int) -> int:
    """Size of a whole file."""
    return _HEADER.size + 4 * n_chunk * n_ctx + 2 * n_chunk * per_window(n_ctx) * record_words(n_vocab)


def header(n_ctx: int, n_vocab: int, tokens: npt.NDArray[np.int32]) -> bytes:
    """All that stands before the first record; `tokens` are of whole windows."""
    return _HEADER.pack(MAGIC, n_ctx, n_vocab, tokens.size // n_ctx) + tokens.astype("<i4").tobytes()


def record(logits: Logits, ln_sum: float) -> npt.NDArray[np.uint16]:
    """The record of a row of logits, (V,) finite float32; `ln_sum` is what `ln_sum_exp` says of it."""
    found = np.zeros(record_words(logits.size), "<u2")
    top = logits.max()
    low = max(logits.min(), top - np.float32(CLIP_NATS))
    scale = (top - low) / np.float32(_STEPS)
    found[:4].view("<f4")[:] = scale, (low - top) - np.float32(ln_sum - float(top))
    if scale > 0:
        places = np.rint((np.float32(1) / scale) * (logits - low))
        found[4 : 4 + logits.size] = np.where(logits > low, places, np.float32(0))
    return found


def ln_p(record: npt.NDArray[np.uint16], n_vocab: int) -> Reals:
    """(V,) float64: what a record says of each token's log-likelihood."""
    scale, least = record[:4].view("<f4").tolist()
    found: Reals = record[4 : 4 + n_vocab].astype(np.float64)
    found *= scale
    found += least
    return found


def ln_p_of(record: npt.NDArray[np.uint16], token: int) -> float:
    """The same of one token."""
    scale, least = record[:4].view("<f4").tolist()
    return float(int(record[4 + token]) * scale + least)


def ln_sum_exp(logits: Logits) -> float:
    """ln of the sum of exp over a row of logits, (V,) float32, in float64."""
    top = float(logits.max())
    parts = [_exp(logits[block].astype(np.float64) - top).sum() for block in _blocks(logits.size)]
    return top + math.log(math.fsum(parts))


def divergence(base: Reals, logits: Logits, ln_sum: float) -> float:
    """KL(base || variant) in nats, as the head of this file says.

    Args:
        base: what `ln_p` says.
        logits: of the variant, with `ln_sum` as their `ln_sum_exp`.
    """
    counted = np.flatnonzero(base > _LEAST_LN_P)
    mine, other = base[counted], logits[counted]
    return math.fsum(
        (_exp(mine[block]) * (mine[block] - other[block] + ln_sum)).sum() for block in _blocks(counted.size)
    )


def _blocks(n: int) -> list[slice]:
    return [slice(at, at + _BLOCK) for at in range(0, n, _BLOCK)]


def _exp(x: Reals) -> Reals:
    """exp of numbers up to 0, to 3e-16; the same bits for every vector width, which NumPy's has not."""
    x = np.maximum(x, -700.0)  # what is smaller counts for nothing in a sum with 1
    twos = np.rint(x * (1 / math.log(2)))
    rest = x - twos * _LN2_HIGH
    rest -= twos * _LN2_LOW
    found = np.full_like(x, _TAYLOR[0])
    for factor in _TAYLOR[1:]:
        found *= rest
        found += factor
    found *= ((twos.astype(np.int64) + 1023) << 52).view(np.float64)
    return found


def is_logit_file(path: str | Path) -> bool:
    """Whether a file is there that begins as these do."""
    try:
        with Path(path).expanduser().open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class LogitFile:
    """A file of logits, mapped.

    Attributes:
        tokens: (n_chunk * n_ctx,) int32, read-only.
        records: (n_chunk * per_window, record_words) uint16, read-only.
        clip_nats: below the maximum, where the file's logits seem to end.

    Raises (on construction):
        ModelError: it cannot be read, is cut short, or holds what no such file does.
    """

    def __init__(self, path: str) -> None:
        self.path, self.paths = path, (path,)
        try:
            with Path(path).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            why = getattr(error, "strerror", None) or error
            raise ModelError(f"{path}: {why}", "check the path and the permissions") from error
        self.n_bytes = len(self._map)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        begins = self._map[: len(MAGIC)]
        if self.n_bytes < _HEADER.size or begins != MAGIC:
            raise ModelError(
                f"{self.path}: begins with {begins!r} and has {self.n_bytes:,} bytes; expected {MAGIC!r} and "
                f"at least {_HEADER.size}",
                "make it by llama-perplexity --kl-divergence-base, or by pagemill compare logits.out=FILE",
            )
        _, self.n_ctx, self.n_vocab, self.n_chunk = _HEADER.unpack_from(self._map)
        if self.n_ctx < 3 or self.n_vocab < 1 or self.n_chunk < 1:
            raise ModelError(
                f"{self.path}: says at byte 8 that it has {self.n_chunk} windows of {self.n_ctx} tokens and "
                f"{self.n_vocab} logits a token; expected at least 1, 3 and 1",
                "the file is broken: make it again",
            )
        expected = file_bytes(self.n_ctx, self.n_vocab, self.n_chunk)
        if self.n_bytes != expected:
            raise ModelError(
                f"{self.path}: ends at byte {self.n_bytes:,}, expected {expected:,} for {self.n_chunk} "
                f"windows of {self.n_ctx} tokens and {self.n_vocab:,} logits a token",
                "was the program that wrote it interrupted, or the download? make it again",
            )
        n_tokens = self.n_chunk * self.n_ctx
        self.tokens: npt.NDArray[np.int32] = np.frombuffer(self._map, "<i4", n_tokens, _HEADER.size)
        self.records: npt.NDArray[np.uint16] = np.frombuffer(
            self._map, "<u2", offset=_HEADER.size + 4 * n_tokens
        ).reshape(-1, record_words(self.n_vocab))
        wrong = np.flatnonzero((self.tokens < 0) | (self.tokens >= self.n_vocab))
        if wrong.size:
            raise ModelError(
                f"{self.path}: token {wrong[0]} at byte {_HEADER.size + 4 * wrong[0]:,} is "
                f"{self.tokens[wrong[0]]}, expected 0 to {self.n_vocab - 1}",
                "the file is broken: make it again",
            )
        self.clip_nats = IK_CLIP_NATS if self._spans(1).max() > CLIP_NATS + _SLACK else CLIP_NATS

    @property
    def per_window(self) -> int:
        """Records of a window."""
        return per_window(self.n_ctx)

    def check(self, n_windows: int) -> None:
        """Refuse records of the first windows that cannot be a model's.

        The most likely of V tokens has a probability between 1 / V and 1.

        Raises:
            ModelError: naming the first.
        """
        heads = self._heads(n_windows)
        spans = self._spans(n_windows)
        with np.errstate(invalid="ignore"):
            top = heads[:, 1] + spans
            fine = (spans >= 0) & (spans <= IK_CLIP_NATS + _SLACK)
            fine &= (top <= _SLACK) & (top >= -math.log(self.n_vocab) - _SLACK)
        wrong = np.flatnonzero(~fine)
        if wrong.size:
            at = int(wrong[0])
            offset = _HEADER.size + 4 * self.tokens.size + at * self.records[0].nbytes
            raise ModelError(
                f"{self.path}: record {at % self.per_window} of window {at // self.per_window}, at byte "
                f"{offset:,}, has scale {heads[at, 0]:g} and least log-likelihood {heads[at, 1]:g}; expected "
                f"what a softmax over {self.n_vocab:,} tokens gives",
                "the file is broken, or its model gave no numbers there: make it again",
            )

    def ln_p(self, index: int) -> Reals:
        """(V,) float64: the log-likelihoods of the record of that rank."""
        return ln_p(self.records[index], self.n_vocab)

    def resident_bytes(self) -> int:
        """Of the file in memory: not counted, it is read once from end to end."""
        return 0

    def close(self) -> None:
        """Give the mapping back; arrays made of it have to be gone."""
        for held in ("tokens", "records"):
            self.__dict__.pop(held, None)
        with suppress(BufferError):  # held by a traceback: the mapping goes with the last array
            self._map.close()

    def _heads(self, n_windows: int) -> Reals:
        """(n, 2) float64: scale and least log-likelihood of the first windows' records."""
        heads = self.records[: n_windows * self.per_window, :4]
        found: Reals = np.ascontiguousarray(heads).view("<f4").astype(np.float64)
        return found

    def _spans(self, n_windows: int) -> Any:
        """(n,) float64: nats from the least log-likelihood to the greatest."""
        return self._heads(n_windows)[:, 0] * _STEPS
