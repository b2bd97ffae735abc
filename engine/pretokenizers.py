r"""Pre-tokenizers: how a text is cut into pieces before byte-pair merges work inside each piece.

A pre-tokenizer is a list of patterns, used one after the other. Each cuts every piece that the ones before it
left into its matches and what lies between; a pattern sees nothing outside its piece: look-ahead stops there.

    "IT'S 1234!\n"    gpt-2           IT  '  S  _1234  !  \n              (_ is a space)
                      smollm          IT  '  S  _  1  2  3  4  !  \n
                      default         IT  '  S  _  123  4  !  \n
                      llama-bpe       IT  'S  _  123  4  !\n
                      qwen2           IT  'S  _  1  2  3  4  !\n
                      tekken          IT  'S  _  1  2  3  4  !\n          (and helloWorld: hello  World)
                      deepseek-llm    IT  '  S  _  1234  !  \n

`default` is llama.cpp's for files that name no pre-tokenizer. Its first pattern takes punctuation out, so
that the contractions of the second never match. The two of DeepSeek know no symbols, `-llm` not even most
alphabets: what no pattern matches stays one piece, spaces included.

Classes are those of Unicode 15.1, as in llama.cpp's tables. The regular expressions of `tokenizers` know
Unicode 16.0, where 4,395 more code points are letters, numbers or punctuation; they are excluded here and
count as "other". White space is the property White_Space in both. Found by asking both about every code
point.

Sources: gpt-2: Radford et al. 2019, the pattern in their encoder.py; smollm: the steps `Digits` and
`ByteLevel` in SmolLM2's tokenizer.json; the others: llama.cpp, `llm_tokenizer_bpe`, which is also where names
share patterns, and `llama_vocab::impl::load` for what a name switches on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_NEW_IN_16 = """
1B4E-1B4F 1B7F-1B7F 1C89-1C8A A7CB-A7CD A7DA-A7DC 105C0-105F3 10D40-10D65 10D6E-10D85 10EC2-10EC4 11380-11389
1138B-1138B 1138E-1138E 11390-113B5 113B7-113B7 113D1-113D1 113D3-113D5 113D7-113D8 116D0-116E3 11BC0-11BE1
11BF0-11BF9 13460-143FA 16100-1611D 16130-16139 16D40-16D79 18CFF-18CFF 1CCF0-1CCF9 1E5D0-1E5ED 1E5F0-1E5FA
1E5FF-1E5FF
"""  # letters, numbers and punctuation
_CASED = """
41-5A 61-7A B5-B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F-37F 386-386 388-38A
38C-38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B
1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59-1F59 1F5B-1F5B 1F5D-1F5D 1F5F-1F7D
1F80-1FB4 1FB6-1FBC 1FBE-1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102-2102
2107-2107 210A-2113 2115-2115 2119-211D 2124-2124 2126-2126 2128-2128 212A-212D 212F-2134 2139-2139 213C-213F
2145-2149 214E-214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787
A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2
10CC0-10CF2 118A0-118DF 1E900-1E943
"""  # deepseek-llm's letters: those of alphabets with upper and lower case, but no Armenian lower case
_MARKS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3001-3002"  # its punctuation: all else of ASCII is in it
_EASTERN = "800-167F 1681-1FFF 200B-2027 202A-202E 2030-205E 2060-2FFF 3001-9FA5 AC00-D7FF"  # no white space


def _set(ranges: str) -> str:
    """The inside of a character class."""
    return "".join(re.sub("[0-9A-F]+", r"\\x{\g<0>}", ranges).split())


_OLD = f"&&[^{_set(_NEW_IN_16)}]"

LETTER, NUMBER, PUNCTUATION = (rf"[\p{{{category}}}{_OLD}]" for category in "LNP")

_GPT_2 = (
    rf"'s|'t|'re|'ve|'m|'ll|'d| ?{LETTER}+| ?{NUMBER}+| ?[^\s{LETTER}{NUMBER}]+"
    r"|\s+(?!\S)"  # white space, but its last character is left to the word behind it
    r"|\s+"
)
_SHORT = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|"
_BEFORE = rf"[^\r\n{LETTER}{NUMBER}]?"  # one character in front of a word
_BETWEEN = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _llama_3(digits: str) -> str:
    return rf"{_SHORT}{_BEFORE}{LETTER}+|{digits}| ?[^\s{LETTER}{NUMBER}]+[\r\n]*{_BETWEEN}"


_NOT_LOWER, _NOT_UPPER = f"[{LETTER}&&[^a-z]]", f"[{LETTER}&&[^A-Z]]"  # ASCII case only, as in llama.cpp
_TEKKEN = (
    f"{_BEFORE}{_NOT_LOWER}*{_NOT_UPPER}+|{_BEFORE}{_NOT_LOWER}+{_NOT_UPPER}*"
    rf"|{NUMBER}| ?[^\s{LETTER}{NUMBER}]+[\r\n/]*{_BETWEEN}"
)

# Where a text may be cut in two whose pieces, one after the other, are those of the whole text.
_AT_SPACE_OR_LINE = r"(?<=\S)[ \n]"
_AT_SPACE_BEHIND_LINE = r"(?<=\S) |(?<=\n)(?=[^\s/])"  # a line's end belongs to the marks in front of it
_AT_LINE = r"[\r\n]"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the name of a pre-tokenizer stands for.

    Attributes:
        patterns: in Oniguruma's syntax.
        cut: a pattern for `re`: the text may be cut in front of its matches.
        ignore_merges: a piece that is a token stays that token, whatever its merges give.
        add_bos: whether BOS is put in front where the file does not say.
    """

    patterns: tuple[str, ...]
    cut: str = _AT_SPACE_OR_LINE
    ignore_merges: bool = False
    add_bos: bool = False


_SINGLE_DIGITS = Rules((NUMBER, _GPT_2))
_RULES = {
    "smollm starcoder refact command-r codeshell exaone minerva-7b": _SINGLE_DIGITS,
    "gpt-2 olmo mpt phi-2 jais trillion exaone4": Rules((_GPT_2,)),  # GPT-NeoX's files say olmo
    "default": Rules((rf"[{PUNCTUATION}$+<=>^~|]+", _GPT_2, rf"{NUMBER}+", "[0-9][0-9][0-9]")),
    "falcon": Rules((rf"[{PUNCTUATION}$+<=>^~|`]+", _GPT_2, "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2": Rules(
        (_llama_3(rf"{NUMBER}{{1,3}}"),), _AT_SPACE_BEHIND_LINE, ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe": Rules((_llama_3(rf"{NUMBER}{{1,3}}"),), _AT_SPACE_BEHIND_LINE),
    "qwen2 deepseek-r1-qwen stablelm2 megrez": Rules((_llama_3(NUMBER),), _AT_SPACE_BEHIND_LINE),
    "tekken": Rules((_TEKKEN,), _AT_SPACE_BEHIND_LINE, ignore_merges=True, add_bos=True),
    "deepseek-llm": Rules(
        (
            r"[\r\n]",
            rf"\s?[{_set(_CASED)}]+",
            rf"\s?[{_set(_MARKS)}]+",
            r"\s+\z",
            f"[{_set(_EASTERN)}]+",
            rf"{NUMBER}+",
        ),
        _AT_LINE,
    ),
    "deepseek-coder": Rules(
        (r"[\r\n]", rf"\s?{LETTER}+", rf"\s?{PUNCTUATION}+", f"[{_set(_EASTERN)}]+", NUMBER), _AT_LINE
    ),
}

RULES: dict[str, Rules] = {name: rules for names, rules in _RULES.items() for name in names.split()}
"""Supported values of `tokenizer.ggml.pre`; the first of each group above is the one to read about."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer called `name` in RULES: its cuts, then bytes to the byte-level alphabet."""
    from tokenizers import Regex, pre_tokenizers  # here, not above: importing the engine has to be fast

    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in RULES[name].patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
