"""Completion in bash: jobs by us, groups and keys by Hydra's own engine, files by the shell.

eval "$(pagemill -sc install=bash)"
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from jobs.overrides import is_path_key

# readline replaces only what follows the last `=` of a word, so what stands before it is taken off each
# answer. Where there is no answer, as for the value of a path, `-o default` has the shell complete files.
BASH = """\
_pagemill_completion() {
    local line=${COMP_LINE:0:COMP_POINT} word
    word=${line##*[[:space:]]}
    mapfile -t COMPREPLY < <(
        COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" "${COMP_WORDS[0]}" -sc query=bash 2>/dev/null
    )
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} != *[=./] ]]; then
        COMPREPLY=("${COMPREPLY[0]} ")
    fi
}
complete -o nospace -o default -F _pagemill_completion pagemill"""
BASH_AWAY = "complete -r pagemill; unset -f _pagemill_completion"
FLAGS = ("--help", "--cfg", "--info", "--multirun", "--resolve", "--package", "--config-dir", "--hydra-help")


def candidates(line: str, jobs: Iterable[str], main_of: Callable[[str], Callable[[], None]]) -> list[str]:
    """Whole words that could stand where the cursor is.

    Args:
        line: the command line up to the cursor.
        jobs: the names of the jobs.
        main_of: gives a job's `@hydra.main` function.
    """
    words = line.split()
    word = words.pop() if words and not line[-1].isspace() else ""
    if not words:
        return []
    if len(words) == 1:
        return _starting_with(word, [*jobs, "--help", "--version"])
    if words[1] not in jobs:
        return []
    if word.startswith("-"):
        return _starting_with(word, FLAGS)
    key, equals, _ = word.partition("=")
    if equals and is_path_key(key):
        return []
    # The values of paths cannot change what is offered, and half a quoted word would not parse.
    before = [w for w in words[2:] if "=" in w and not is_path_key(w.partition("=")[0]) and not _quoted(w)]
    found = _starting_with(word, _ask_hydra(main_of(words[1]), [*before, word]))
    return found if word.startswith("hydra") else [name for name in found if not name.startswith("hydra")]


def query(jobs: Iterable[str], main_of: Callable[[str], Callable[[], None]]) -> list[str]:
    """`candidates` for what bash hands over in COMP_LINE and COMP_POINT."""
    line = os.environ.get("COMP_LINE", "").encode(errors="surrogateescape")
    point = os.environ.get("COMP_POINT", "")
    typed = line[: int(point)] if point.isdecimal() else line
    return candidates(typed.decode(errors="ignore"), jobs, main_of)


def _quoted(word: str) -> bool:
    return "'" in word or '"' in word


def _starting_with(word: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(word)]


def _ask_hydra(main: Callable[[], None], words: Sequence[str]) -> list[str]:
    """What Hydra would offer for the last word; nothing when the words before it do not compose."""
    printed = io.StringIO()
    argv = sys.argv
    sys.argv = ["pagemill", "-sc", "query=bash"]
    os.environ["COMP_LINE"] = " ".join(["pagemill", *words])
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            main()
    except (Exception, SystemExit):  # whatever is wrong with a half-typed line, a completion stays silent
        return []
    finally:
        sys.argv = argv
    return printed.getvalue().split()
