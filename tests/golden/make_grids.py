"""Makes engine/quants/_grids.py: the grids of the IQ1, IQ2 and IQ3 types, facts of ggml's format.

    pip install gguf==0.19.0
    python tests/golden/make_grids.py

tests/engine/test_quants.py compares the file with what this would write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import quants

TARGET = Path(__file__).parents[2] / "engine" / "quants" / "_grids.py"

HEAD = '''"""The grids of the IQ1, IQ2 and IQ3 types: rows of weights that a number chooses.

A row is four hexadecimal digits, weight 0 first. IQ1 and IQ2: eight codes of 2 bits, the earlier one of a
digit in its low bits; IQ3: four codes. What a code means is in `iq1.py`, `iq2.py` and `iq3.py`.

Made by tests/golden/make_grids.py from `grid` of the classes of `gguf.quants` 0.19; not to be edited by hand.
"""

from __future__ import annotations

import numpy as np

EVEN_SIGNS = np.array([bits | (bits.bit_count() & 1) << 7 for bits in range(128)], np.uint8)
"""Eight signs, an even number of them set, of the seven bits that are stored."""


def rows(digits, values):
    """A grid's rows as words: a weight a byte; uint64 where codes have 2 bits, else uint32."""
    per_digit, bits = (2, 2) if len(values) <= 4 else (1, 4)
    nibbles = np.frombuffer(bytes.fromhex("0" + "0".join(digits)), np.uint8)[:, None]
    codes = nibbles >> np.arange(0, 4, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
    octets = np.array(values, np.int8)[codes.ravel()]
    return octets.view(f"<u{4 * per_digit}")

'''


def digits(type_name: str) -> str:
    """A type's grid as digits."""
    kind = getattr(quants, type_name)
    kind.init_grid()
    rows = kind.grid.reshape(kind.grid_shape)
    codes = np.searchsorted(np.array(kind.grid_map, np.float32), rows)
    if kind.grid_shape[1] == 8:
        codes = codes[:, 0::2] | codes[:, 1::2] << 2
    return "".join(f"{code:x}" for code in codes.ravel())


def text() -> str:
    """The whole module."""
    parts = [HEAD]
    for name, type_name in (
        ("IQ1", "IQ1_S"),
        ("IQ2_XXS", "IQ2_XXS"),
        ("IQ2_XS", "IQ2_XS"),
        ("IQ2_S", "IQ2_S"),
        ("IQ3_XXS", "IQ3_XXS"),
        ("IQ3_S", "IQ3_S"),
    ):
        all_digits = digits(type_name)
        lines = [all_digits[at : at + 96] for at in range(0, len(all_digits), 96)]
        parts.append("\n".join([f"{name} = (", *(f'    "{line}"' for line in lines), ")\n"]))
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(text())
    print(TARGET, TARGET.stat().st_size, "bytes")
