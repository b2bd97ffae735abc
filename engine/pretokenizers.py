r"""Pre-tokenizers: how a text is cut into pieces before byte-pair merges work inside each piece.

A pre-tokenizer is a list of patterns, used one after the other. Each cuts every piece that the ones before it
left into its matches and what lies between; a pattern sees nothing outside its piece: look-ahead stops there.

    "it's 1234!"      gpt-2     it  's  _1234  !            (_ is a space)
                      smollm    it  's  _  1  2  3  4  !
                      default   it  '  s  _  123  4  !

`default` is llama.cpp's for files that name no pre-tokenizer. Its first pattern takes punctuation out, so
that the contractions of the second never match.

Classes are those of Unicode 15.1, as in llama.cpp's tables. The regular expressions of `tokenizers` know
Unicode 16.0, where 4,395 more code points are letters, numbers or punctuation; they are excluded here and
count as "other". White space is the property White_Space in both. Found by asking both about every code
point.

Sources: gpt-2: Radford et al. 2019, the pattern in their encoder.py; smollm: the steps `Digits` and
`ByteLevel` in SmolLM2's tokenizer.json; default: llama.cpp, `llm_tokenizer_bpe`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_NEW_IN_16 = """
1B4E-1B4F 1B7F-1B7F 1C89-1C8A A7CB-A7CD A7DA-A7DC 105C0-105F3 10D40-10D65 10D6E-10D85 10EC2-10EC4 11380-11389
1138B-1138B 1138E-1138E 11390-113B5 113B7-113B7 113D1-113D1 113D3-113D5 113D7-113D8 116D0-116E3 11BC0-11BE1
11BF0-11BF9 13460-143FA 16100-1611D 16130-16139 16D40-16D79 18CFF-18CFF 1CCF0-1CCF9 1E5D0-1E5ED 1E5F0-1E5FA
1E5FF-1E5FF
"""  # letters, numbers and punctuation
_OLD = "&&[^" + "".join(re.sub("[0-9A-F]+", r"\\x{\g<0>}", _NEW_IN_16).split()) + "]"

LETTER, NUMBER, PUNCTUATION = (rf"[\p{{{category}}}{_OLD}]" for category in "LNP")

_GPT_2 = (
    rf"'s|'t|'re|'ve|'m|'ll|'d| ?{LETTER}+| ?{NUMBER}+| ?[^\s{LETTER}{NUMBER}]+"
    r"|\s+(?!\S)"  # white space, but its last character is left to the word behind it
    r"|\s+"
)

PATTERNS: dict[str, tuple[str, ...]] = {
    "smollm": (NUMBER, _GPT_2),
    "gpt-2": (_GPT_2,),
    "default": (rf"[{PUNCTUATION}$+<=>^~|]+", _GPT_2, rf"{NUMBER}+", "[0-9][0-9][0-9]"),
}
"""Supported values of `tokenizer.ggml.pre`, and the patterns of each in Oniguruma's syntax."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer called `name` in PATTERNS: its cuts, then bytes to the byte-level alphabet."""
    from tokenizers import Regex, pre_tokenizers  # here, not above: importing the engine has to be fast

    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
