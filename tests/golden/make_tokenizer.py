"""Makes tokenizer_*.json: digests of llama.cpp's ids, for tests that run without it.

    pip install cyllama==0.2.18        (a wheel with llama.cpp b9190 in it)
    PYTHONPATH=.:tests python tests/golden/make_tokenizer.py wiki.test.raw \\
        smollm2=SmolLM2-135M-Instruct.Q4_1.gguf gemma=gemma-3-270m-q4_k_m.gguf

It takes five minutes, four of them for the classes of all characters. tests/engine/test_tokenizer.py and
test_tokenizer_scores.py use the strings, the vocabularies and `Oracle` too.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from make_gguf import Typed, tiny_llama

import engine

HERE = Path(__file__).parent
PRES = tuple(
    "smollm gpt-2 default llama-bpe qwen2 olmo deepseek-llm deepseek-coder falcon starcoder refact command-r "
    "tekken".split()
)

NASTY = [
    "",
    " ",
    "  ",
    "   x",
    "\n",
    "\n\n",
    "\n \n\n  \n",
    " \n x\n",
    "\r\n\r\ntext\r\n",
    "\r\r\n x",
    "\t\tdef f(x):\n\t\treturn x  # 1 \n",
    "trailing spaces   ",
    "trailing newline \n",
    " leading",
    "\u3000\u3000x \u3000 x\u3000",
    "a\u00a0b \u00a0 c\u00a0",
    "a\u0085b\u0085\u0085c",
    "a\u2028b\u2029c\u202fd\u205fe\u1680f",
    "\u2000\u2001\u2009x\u200ay",
    "a\u180eb \u180e c",  # not white space since Unicode 6.3
    "a\u200bb\u2060c\ufeffd",
    "\ufeffBOM first",
    "\x00",
    "a\x00b\x00\x00 \x00",
    "\x01\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x0f",
    "\x10\x1b[0m\x1c\x1d\x1e\x1f\x7f\x80\x9f",
    "it's I'm you're we've they'll he'd don't",
    "IT'S I'M YOU'RE WE'VE THEY'LL HE'D DON'T",
    "it\u2019s don\u2019t",
    "'s't're've'm'll'd''s '' ' s 'sx 're'",
    "x's'y't 'S'T 'll'l 'v 'r",
    "he'd've 'twas o'clock rock'n'roll",
    "1234567890 12 345 6.7 8,900 1e-10 0x1F",
    "a1b22c333d4444 55555",
    " 1 22 333 4444",
    "\u0663\u0664\u0665 \u0967\u0968\u0969 \uff11\uff12\uff13",  # digits of other scripts
    "\u00b2\u00b3\u00b9 \u00bd\u00be \u2160\u2171 \u2460\u32bf \u3007",  # numbers that are no digits
    "1\u0301 2\ufe0f\u20e3 x\u00b2 10\u2075",
    "!!!??? ... ,,, ;;; -- \u2014\u2014 __ **",
    "$+<=>^~|` #%&@/\\[]{}()\"'",
    "a=b+c;d<e>f|g^h~i`j$k",
    "x!=y==z<=w>=v&&u||t<<s>>r->q::p",
    "$100 \u20ac200 \u00a3300 \u00a5400 \u20bf500",
    "\u00ab\u00bb\u201c\u201d\u2018\u2019\u2026\u00bf\u00a1\u00a7\u00b6",
    "http://user:pw@example.org:8080/a/b.html?q=1&r=%20#frag",
    "naïve café Ünïcödé",
    "e\u0301 e\u0301\u0302 \u0301x \u0301\u0301",
    "\u0301",
    "Z\u0351\u036b\u0343a\u036c\u0346l\u0356\u0354g\u0322\u0328o\u0313",
    "Привет, мир! Ёлка",
    "שָׁלוֹם עֲלֵיכֶם",
    "السَّلَامُ عَلَيْكُمْ ١٢٣",
    "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก ไม่มีเว้นวรรค",
    "你好\uff0c世界。\uff11\uff12\uff13\uff21\uff22\uff23",
    "こんにちは世界ー。カタカナ ﾊﾝｶｸ",
    "안녕하세요 세계 \u1112\u1161\u11ab",
    "\U0001f600\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd",
    "\U0001f1e9\U0001f1ea\u2764\ufe0f\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "\U0001d400\U0001d401 \U0001d7d8\U0001d7d9 \u210c\u2115 \u2211\u222b\u221a",
    "\ue000\uf8ff \U000f0000\U0010fffd \ufffd \uffff \U0010ffff",  # private use, noncharacters
    "\u0378\u0379 \u2fe0 \U0003ffff \U00050000",  # not assigned
    "\u1c89\ua7cb\U000105c0x \U00010d40\U00010d416 \u1b4e.\U000113d4!",  # new in Unicode 16
    "\U0002ebf0\U0002ee5d\u4e00 \u31ef",  # new in Unicode 15.1
    "\u01c5\u01c8 \u02b0\u02c1 \u00aa\u00ba \u0345 \u16ee",  # title case, modifiers, ordinals
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a <|endoftext|> b<|endoftext|><|endoftext|>",
    "<|endoftext",
    "<s>x</s><unk><pad>[EMPTY_260]",
    "<tool><a><b><a ><b><tool> <<tool>>",
    "ab<\x00tool>  two   three    four",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    " " * 300 + "x" + " " * 300,
    "\n" * 100 + "\t" * 100,
    "ab" * 200,
    "!?" * 100 + "1" * 100,
    "helloWorld HTTPServer XMLHttpRequest iPhone \u00c9tat \u00e9TAT aB1Cd \u01c5aB",
    "end!\n\n/path //\n/x ;\r\n\r\ny ?\n \nz",
    "it'S he'Ll we'rE I'vE 'D 'x",
    "\u0627\u0628 \u062c\u062f \u05d0\u05d1 \u0561\u0562 + + = = \u2211 \u222b  \u0627",
    "\u4e2d\u6587 12\u4e2d34 \uac00\ub098 \ud7ff \u3042\u3000\u3001 \u0e01 \u0800",
    "x = 3;\t\t// \u4e2d\n\n\nfoo_bar(1234567)   \n",
    "\u2581 raw\u2581\u2581 \u2581x \u2581",
    "<0x41> <0x0A><0x> </s><s> [INST]  x [/INST]\n\n",
    "abab ababab aaaa aaaaaaa  bbb qqq Zebra",
]


def random_text(n_runs: int, seed: int) -> str:
    """Short runs of characters from many scripts and classes, several characters a run."""
    rng = np.random.default_rng(seed)
    ranges = """
    61-7A 61-7A 41-5A 30-39 20-20 20-20 A-A 9-D 21-2F 3A-40 5B-60 7B-7E 0-1F 7F-A0 A1-BF C0-24F 250-36F
    370-3FF 400-52F 590-5FF 600-6FF 900-97F E00-E7F 1100-11FF 1680-1680 1B00-1B7F 1C80-1C8F 2000-206F
    2070-20CF 20D0-20FF 2100-218F 2190-2BFF 2E00-2E7F 3000-303F 3040-30FF 3200-33FF 4E00-9FFF A640-A69F
    A720-A7FF AC00-D7A3 E000-E0FF FE00-FE0F FF00-FFEF FFF0-FFFF 10000-107FF 10D00-10EFF 11300-113FF
    13430-143FF 16D40-16D8F 1D400-1D7FF 1E5D0-1E5FF 1F300-1F6FF 1F900-1FAFF 20000-2A6DF 2EBF0-2EE5D
    30000-3134F 40000-400FF E0000-E01EF F0000-F00FF 10FF00-10FFFF
    """.split()
    words = [
        "'s",
        "'t",
        "'re",
        "'ve",
        "'m",
        "'ll",
        "'d",
        "'S",
        "'LL",
        "\u2019s",
        " the",
        "ing",
        "123",
        "\r\n",
        "  ",
    ]
    parts = []
    for kind, length, start in zip(
        rng.integers(0, len(ranges) + 6, n_runs), rng.integers(1, 9, n_runs), rng.random(n_runs), strict=True
    ):
        if kind >= len(ranges):
            parts.append(words[int(start * len(words))])
            continue
        first, last = (int(end, 16) for end in ranges[kind].split("-"))
        parts.append("".join(map(chr, rng.integers(first, last + 1, length))))
    return "".join(parts)


def tiny_vocabulary() -> dict[str, Any]:
    """Metadata of a vocabulary whose merges show where the pre-tokenizer cuts, with every kind of token.

    Any two characters that stay in one piece merge if they are common ASCII, or if one is a probe.
    Four bytes have no token.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    special = dict.fromkeys(["<|endoftext|>", "<s>", "<|im_start|>", "<|unused_1|>"], 3)
    special |= {"<unk>": 2, "<pad>": 5, "<0x41>": 6, "": 1, "\u2581raw text": 1}
    special |= dict.fromkeys(["<tool>", "<a>", "<a><b>", "b><", "   "], 4)
    special |= {"<|im_end|>": 4}  # a control token all the same, by its name
    tokens = [*special, *(alphabet[byte] for byte in range(256) if byte not in (0x04, 0x06, 0xF1, 0xF5))]
    starts, tails = [*range(128), *range(0xC2, 0xF5)], range(0x80, 0xC0)
    common = b" \t\n\r'0123456789abdelmrstvxSTRELV.,!?$+<=>^~|_-"
    pairs = [
        (tail, start) for tail in (0xA9, 0xA3, 0xB1, 0xBF, 0x81) for start in starts
    ]  # of the five probes
    pairs += [(tail, start) for tail in tails for start in (0xC2, 0xC3, 0xCC, 0xD9)]
    pairs += [(left, right) for left in common for right in common]
    known, rng = set(tokens), np.random.default_rng(2)
    unique = [pair for pair in dict.fromkeys(pairs) if {alphabet[pair[0]], alphabet[pair[1]]} <= known]
    merges = [(alphabet[unique[i][0]], alphabet[unique[i][1]]) for i in rng.permutation(len(unique))]
    tokens += [left + right for left, right in merges]
    pool = [alphabet[left] + alphabet[right] for left, right in unique if left < 128 and right < 128]
    for a, b in rng.integers(0, len(pool), (400, 2)):
        if pool[a] + pool[b] not in known:
            known.add(pool[a] + pool[b])
            merges.insert(int(rng.integers(0, len(merges))), (pool[a], pool[b]))
            tokens.append(pool[a] + pool[b])
    tokens += ["\u0120two", "helloWorld"]  # no merge makes them: see `ignore_merges`
    types = [special.get(text, 1) for text in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.merges": Typed("str", [f"{left} {right}" for left, right in merges]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }


def tiny_scores() -> dict[str, Any]:
    """Metadata of a SentencePiece-type vocabulary: few scores, so many are equal, and every kind of token.

    Some ASCII is missing, so bytes stand for it; some tokens have a space inside or at their end; control and
    unused tokens can come out of merges.
    """
    rng = np.random.default_rng(3)
    special = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    special |= {"<tool>": 4, "\n\n": 4, "   ": 4, "[INST]": 3, "<|im_end|>": 4, "": 1, "\u2581\u2581x": 5}
    letters = (
        "".join(chr(c) for c in range(33, 127) if chr(c) not in "qQZ7^")
        + "\u2581\u00e9\u00e0\u4e2d\u6587\u0430\u0431"
    )
    runs = ["\u2581" * n for n in (2, 3, 4, 7, 8)] + ["a" * n for n in (2, 3, 5)] + ["ab", "ba", "aba", "bab"]
    inside = ["e\u2581t", "s\u2581", ".\u2581", "\u2581a\u2581", "</", "s>", "<0", "x4", "<0x4", "1>"]
    tokens = dict.fromkeys([*special, *letters, *runs, *inside])
    common = "aeionrstlhdcum\u2581\u2581\u2581.,'1234<>/\u00e9\u4e2d\u0430"
    pool = list(common)
    for left, right in zip(rng.random(2500), rng.random(2500), strict=True):
        text = pool[int(left * len(pool))] + pool[int(right * len(pool))]
        if text not in tokens and len(text) <= 8:
            tokens[text] = None
            pool.append(text)
    scores = rng.choice(np.array([-1.5, -2, -2, -3, -7, -7.25, -100], np.float32), len(tokens))
    scores[rng.permutation(len(tokens))[: len(tokens) // 3]] = 0.0
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": np.array([special.get(text, 1) for text in tokens], np.int32),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_space_prefix": None,
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": None,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.add_eos_token": None,
    }


def vocabulary_of(path: str | Path) -> dict[str, Any]:
    """The tokenizer's metadata of a GGUF file, to write them into another."""
    with engine.open(path) as file:
        found = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.ggml.")}
        return {key: _copied(value) for key, value in found.items()}


def _copied(value: Any) -> Any:
    """A metadata value that outlives its file."""
    if hasattr(value, "to_list"):
        return Typed("str", value.to_list())
    return value.copy() if isinstance(value, np.ndarray) else value


def write_model(path: Path, vocabulary: dict[str, Any], pre: str | None) -> Path:
    """The smallest model that llama.cpp loads, with `vocabulary` and the pre-tokenizer `pre`."""
    tokens = vocabulary["tokenizer.ggml.tokens"]
    n_vocab = len(tokens.value if isinstance(tokens, Typed) else tokens)
    settings = vocabulary | {"tokenizer.ggml.pre": pre}
    return tiny_llama(path, n_layers=1, width=8, n_heads=1, n_kv_heads=1, ff=8, vocab=n_vocab, **settings)


class Oracle:
    """llama.cpp's tokenizer of a model file."""

    def __init__(self, path: Path) -> None:
        from cyllama.llama import llama_cpp

        llama_cpp.disable_logging()
        llama_cpp.llama_backend_init()
        llama_cpp.ggml_backend_load_all()
        self._model = llama_cpp.LlamaModel(str(path), llama_cpp.LlamaModelParams(), verbose=False)
        self.vocab = self._model.get_vocab()

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        ids: list[int] = self.vocab.tokenize(text, add_special, parse_special)
        return ids


def digest(values: Iterable[int]) -> str:
    """SHA-256 of `values` as little-endian int32."""
    return hashlib.sha256(np.asarray(values, dtype="<i4").tobytes()).hexdigest()


def answers(encode: Callable[..., Iterable[int]], text: str) -> str:
    """Ids of `text`: plain, with special tokens read, with BOS and EOS; "=" where they are the plain ones."""
    plain, *others = (
        " ".join(map(str, encode(text, add_special=add, parse_special=parse)))
        for add, parse in ((False, False), (False, True), (True, False))
    )
    return " | ".join([plain, *("=" if other == plain else other for other in others)])


def code_points() -> list[int]:
    """All that UTF-8 can hold but planes 4 to 7: empty, and the tiny vocabulary lacks their first byte."""
    return [*range(0xD800), *range(0xE000, 0x40000), *range(0x80000, 0x110000)]


def classes(gpt_2: Oracle, default: Oracle) -> dict[str, list[int]]:
    """Code points by class, of the tiny vocabulary's oracles: does a probe of that class merge with it?"""
    letters, numbers, others, punctuation = [], [], [], []
    for oracle, probe, found in (
        (gpt_2, "\u00e9", letters),
        (gpt_2, "\u0663", numbers),
        (gpt_2, "\u00b1", others),
        (default, "\u00bf", punctuation),
    ):
        alone = oracle.encode(probe, add_special=False)
        found += [
            c
            for c in code_points()
            if oracle.encode(probe + chr(c), add_special=False)[: len(alone)] != alone
        ]
    rest = sorted(set(code_points()) - set(letters) - set(numbers) - set(others))
    spaces = [c for c in rest if gpt_2.encode(chr(c), add_special=False)]  # not those without a token
    return {"letter": letters, "number": numbers, "punctuation": punctuation, "space": spaces}


def golden_of(oracle: Oracle) -> dict[str, Any]:
    """What a golden file says of one tokenizer."""
    nasty = [hashlib.sha256(answers(oracle.encode, text).encode()).hexdigest()[:16] for text in NASTY]
    return {"nasty": nasty, "random": digest(oracle.encode(random_text(20_000, seed=1), add_special=False))}


def main(wikitext: str, *models: str) -> None:
    """Writes all files."""
    text = Path(wikitext).read_bytes().decode().removesuffix("\n")
    vocabularies = {"tiny": tiny_vocabulary(), "scores": tiny_scores()}
    for model in models:
        name, path = model.split("=")
        vocabularies[name] = vocabulary_of(path)
    for name, vocabulary in vocabularies.items():
        golden: dict[str, Any] = {
            "made_by": "python tests/golden/make_tokenizer.py",
            "oracle": "llama.cpp b9190 (cyllama 0.2.18)",
        }
        by_score = vocabulary["tokenizer.ggml.model"] == "llama"
        with TemporaryDirectory() as folder:
            for pre in ("default",) if by_score else PRES:
                golden[pre] = golden_of(Oracle(write_model(Path(folder) / pre, vocabulary, pre)))
            if by_score:
                prefix = vocabulary["tokenizer.ggml.add_space_prefix"] is not False
                other = vocabulary | {"tokenizer.ggml.add_space_prefix": not prefix}
                path = write_model(Path(folder) / "other", other, "default")
                golden["no prefix" if prefix else "prefix"] = golden_of(Oracle(path))
            if name == "tiny":
                gpt_2, default = (Oracle(Path(folder) / pre) for pre in ("gpt-2", "default"))
                found = classes(gpt_2, default)
                golden["classes"] = {kind: [len(points), digest(points)] for kind, points in found.items()}
            if name in ("smollm2", "gemma"):
                ids = Oracle(Path(folder) / str(vocabulary["tokenizer.ggml.pre"])).encode(text)
                golden["wikitext2"] = [len(ids), digest(ids)]
        path = HERE / f"tokenizer_{name}.json"
        path.write_text(json.dumps(golden, indent=1) + "\n")
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
