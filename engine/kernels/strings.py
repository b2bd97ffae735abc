"""Finds the strings of a GGUF string array, which are stored one after another, each behind its length."""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel


@kernel
def locate_strings(data, first, starts):
    """Writes where each string's bytes begin; twin of `engine.gguf_fields.locate_strings_plainly`.

    Args:
        data: (n_bytes,) uint8, the file.
        first: byte at which the first string's length (uint64) begins.
        starts: (n + 1,) int64, overwritten: the absolute offset of each string's first byte, then that of the
            string that would follow. At the first string that does not fit, number i, starts[n] is -1 - i and
            what lies between is left alone.
    """
    n = starts.size - 1
    end = np.int64(data.size)
    at = np.int64(first)
    for i in range(n):
        starts[i] = at + 8
        if end - at < 8:
            starts[n] = -1 - i
            return
        length = np.uint64(0)
        for byte in range(8):  # LLVM makes one load of it
            length |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
        at += 8
        if length > np.uint64(end - at):
            starts[n] = -1 - i
            return
        at += np.int64(length)
    starts[n] = at + 8
