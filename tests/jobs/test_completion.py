"""Completion, asked as bash asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli, completion


def offered(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line.encode())))
    assert cli.run(["-sc", "query=bash"]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("line", "among", "not_among"),
    [
        ("pagemill ", ["perplexity"], []),
        ("pagemill per", ["perplexity"], []),
        ("pagemill perplexity ", ["data=", "data.", "protocol.", "experiment=", "seed="], ["hydra."]),
        ("pagemill perplexity data=", ["data=wikitext2", "data=text", "data=jsonl"], []),
        ("pagemill perplexity data=wiki", ["data=wikitext2"], ["data=text"]),
        ("pagemill perplexity protocol.", ["protocol.window=", "protocol.limit="], ["data="]),
        ("pagemill perplexity experiment=demo clus", ["cluster=", "cluster."], []),
        ("pagemill perplexity model.path='a b' da", ["data=", "data."], []),
        ("pagemill perplexity --mul", ["--multirun"], []),
        ("pagemill perplexity hydra.jo", ["hydra.job."], []),
    ],
)
def test_jobs_groups_and_keys_are_offered(line, among, not_among, monkeypatch, capsys) -> None:
    found = offered(line, monkeypatch, capsys)
    assert set(among) <= set(found)
    assert not set(not_among) & set(found)
    word = line.split(" ")[-1]
    assert all(name.startswith(word) for name in found)


@pytest.mark.parametrize(
    "line",
    [
        "pagemill perplexity model.path=",
        "pagemill perplexity data.path=./x",
        "pagemill nothing da",
        "pagemil",
    ],
)
def test_files_and_unknown_jobs_are_left_to_the_shell(line, monkeypatch, capsys) -> None:
    assert offered(line, monkeypatch, capsys) == [], "one empty answer would have bash erase the word"


def test_groups_are_offered_even_where_the_words_before_do_not_compose(monkeypatch, capsys) -> None:
    assert offered("pagemill perplexity data=nothing prot", monkeypatch, capsys) == ["protocol="]


def test_what_cannot_be_parsed_is_silent(monkeypatch, capsys) -> None:
    assert offered("pagemill perplexity seed={ prot", monkeypatch, capsys) == []


def test_the_words_after_the_cursor_do_not_matter(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COMP_LINE", "pagemill perpl data=text")
    monkeypatch.setenv("COMP_POINT", str(len("pagemill perpl")))
    cli.run(["-sc", "query=bash"])
    assert capsys.readouterr().out.splitlines() == ["perplexity"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "replies"),
    [
        (["pagemill", "perp"], ["perplexity "]),
        (["pagemill", "perplexity", "data", "=", "wiki"], ["wikitext2 "]),
        (["pagemill", "perplexity", "protocol.w"], ["protocol.window="]),
        (["pagemill", "perplexity", "model.path", "=", "x"], []),
    ],
)
def test_bash_gets_what_readline_has_to_insert(words, replies, tmp_path: Path) -> None:
    # bash splits words at `=` too, and replaces the last part only.
    line = " ".join(words).replace(" = ", "=")
    script = tmp_path / "pagemill"
    code = "import sys; from jobs import cli; cli.main()"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    script.chmod(0o755)
    program = f"""
        eval "$(pagemill -sc install=bash)"
        COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
        COMP_LINE="{line}"; COMP_POINT={len(line)}
        _pagemill_completion
        (( ${{#COMPREPLY[@]}} )) && printf '%s|' "${{COMPREPLY[@]}}"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", program], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split("|")[:-1] == replies, done.stderr


def test_installing_and_removing_are_scripts_that_bash_reads() -> None:
    for script in (completion.BASH, completion.BASH_AWAY):
        assert subprocess.run(["bash", "-n", "-c", script], timeout=10).returncode == 0
