"""The command line's `key=value` words, before Hydra reads them: paths are quoted, so that any path works.

Hydra's grammar gives `=`, commas, parentheses, quotes, braces and `$` a meaning, and a shell expands
`~` only at the start of a word. A path is therefore taken literally:

    model.path=~/my models/a=b, (1).gguf    ->    model.path='/home/me/my models/a=b, (1).gguf'

Left to Hydra as they are: `null`, `???`, nothing at all, and a value already in Hydra's own quotes, which is
the way to have an interpolation (model.path="'${paths.results}/x.gguf'").
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

PATH_ENDINGS = ("path", "dir", "out", "tokenizer", "imatrix")
LITERAL_KEYS = ("tracking.uri", "results.where", "baseline", "run")
"""Not paths, but texts from outside as well; `~` stays."""
LISTS_OF_REGEXES = ("quantize.tensor_types",)
"""Of REGEX=TYPE each; a regular expression is all that Hydra's grammar has another meaning for."""
OPEN_KEYS = ("sweep", "results.filter", "limits")
"""Mappings with keys of the user's: Hydra wants `++` before those."""
LISTS_OF_PATHS = ("variants",)
"""Lists whose elements are paths, or names without anything that Hydra would read."""

_FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd"),
    *("--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun"),
)
_WORD = re.compile(r"(\+{0,2}[^=~+]+)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_OF_CHECK = re.compile(r"\+{0,2}(suite\.checks\.[\w-]+)(?:\.(set|limits)\.([^=]+))?((?:\..+)?)")
_RULE = re.compile(r"\s*(.+?=\s*\w+)\s*(?:,|\Z)", re.DOTALL)
_SWEEP = re.compile(r"(?:choice|shuffle|sort)\(.*\)", re.DOTALL)


def quote_paths(words: Sequence[str]) -> list[str]:
    """The words with every path quoted for Hydra; everything else unchanged.

    With `--multirun` a path with commas that does not exist is read as several; `choice(...)` is kept.
    """
    sweeping = "--multirun" in words or "-m" in words
    return [_quote_word(word, sweeping) for word in words]


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides and Hydra's flags with their values, apart; argparse reads them mixed only in part."""
    overrides: list[str] = []
    flags: list[str] = []
    for i, word in enumerate(words):
        is_flag = word.startswith("-") or (i > 0 and words[i - 1] in _FLAGS_WITH_VALUE and "=" not in word)
        (flags if is_flag else overrides).append(word)
    return overrides, flags


def is_path_key(key: str) -> bool:
    """Whether the value is a path: by its last part, or those of `paths`; never Hydra's own keys."""
    head, _, last = key.lstrip("+").rpartition(".")
    in_paths = head == "paths" and not last.endswith("limit")
    return bool(head) and not key.startswith("hydra") and (last in PATH_ENDINGS or in_paths)


def literal(text: str) -> str:
    """`text` as a quoted value of Hydra's grammar that evaluates to exactly `text`."""
    # OmegaConf reads `${` in any string, quoted or not; an odd number of backslashes makes it literal.
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)
    # Hydra halves the backslashes that stand before a quote, the closing one included.
    text = re.sub(r"(\\+)(?='|\Z)", r"\1\1", text)
    return "'" + text.replace("'", r"\'") + "'"


def _quote_word(word: str, sweeping: bool) -> str:
    match = _WORD.fullmatch(word)
    if word.startswith("-") or match is None:
        return word
    key, value = match.groups()
    if (of_check := _OF_CHECK.fullmatch(key)) is not None:
        return _of_check(of_check, value)
    if key.lstrip("+") in LISTS_OF_REGEXES:
        return f"{key}={_quote_rules(value)}"
    if key in OPEN_KEYS and value.lstrip().startswith("{"):
        return f"++{word}"
    if key in LISTS_OF_PATHS and value[:1] == "[" and value[-1:] == "]" and not set(value) & {"'", '"'}:
        return f"{key}=[{','.join(literal(part.strip()) for part in value[1:-1].split(',') if part.strip())}]"
    if not (is_path_key(key) or key.lstrip("+") in LITERAL_KEYS):
        return word
    if sweeping and "," in value and not Path(value).expanduser().exists():
        if _SWEEP.fullmatch(value) or _QUOTED.match(value):
            return word
        return f"{key}=" + ",".join(_quote_value(key, part) for part in value.split(","))
    return f"{key}={_quote_value(key, value)}"


def _quote_value(key: str, value: str) -> str:
    if value in ("", "???") or value.lower() == "null" or _QUOTED.fullmatch(value):
        return value
    # os.path keeps what pathlib would tidy away: `./x`, a trailing slash.
    return literal(os.path.expanduser(value) if is_path_key(key) else value)  # noqa: PTH111


def _of_check(match: re.Match[str], value: str) -> str:
    """A key of a suite's check, whose settings and limits are mappings with dots and slashes in their keys.

    suite.checks.A.set.model.path=B.gguf    ->    ++suite.checks.A.set={model.path:'B.gguf'}
    """
    check, of, key, rest = match.groups()
    if of is None:
        return f"++{check}{rest}={value}"
    if of == "limits":
        metric, _, kind = key.partition(".")
        bound = literal(value) if value[:1] in ("<", ">") else value
        return f"++{check}.limits={{{metric}:{f'{{{kind}:{bound}}}' if kind else bound}}}"
    quoted = _quote_word(f"{key}={value}", sweeping=False).partition("=")[2]
    return f"++{check}.set={{{key}:{quoted}}}"


def _quote_rules(value: str) -> str:
    """A list of REGEX=TYPE, with brackets around it or without; one in quotes of Hydra's is left alone."""
    is_list = value.startswith("[") and value.endswith("]")
    inner = value[1:-1] if is_list else value
    if not inner.strip() or inner.lstrip()[0] in "'\"" or value.lower() == "null":
        return value
    rules = _RULE.findall(inner) if _RULE.sub("", inner) == "" else [inner]
    return "[" + ",".join(literal(rule) for rule in rules) + "]"
