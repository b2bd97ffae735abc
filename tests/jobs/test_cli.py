"""The command line's contract: one JSON line, exit codes, and messages with a way on (contract.md 4)."""

from __future__ import annotations

import errno
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import engine
from jobs.outcome import COMMON_KEYS
from pipeline import errors

GIVEN = ("perplexity", "model.path=m.gguf", "data.path=t.txt", "paths.results=results")

# Runs the command line with a pipeline that does what argv[1] says; the rest of argv is the command line.
HARNESS = """
import sys
import pipeline
from jobs import cli
def evaluate(settings, progress=None):
    {body}
pipeline.evaluate = evaluate
sys.exit(cli.run(sys.argv[1:]))
"""
CHATTER = """
    import os, subprocess, atexit
    print("from print")
    os.write(1, b"from the descriptor\\n")
    subprocess.run(["echo", "from a child"])
    atexit.register(lambda: print("from an exit handler"))
    from pipeline import RunResult
    return RunResult({"exit_code": 0, "ppl": 0.1 + 0.2}, [], "", 0)
"""


def start(body: str, *words: str, **kwargs) -> subprocess.Popen[str]:
    code = HARNESS.replace("{body}", body.strip())
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs}
    return subprocess.Popen([sys.executable, "-c", code, *words], **kwargs)


def test_success_is_one_json_line_with_every_common_key(pagemill, pipeline) -> None:
    answer = pagemill(*GIVEN)
    assert answer.exit_code == 0
    assert answer.stdout.count("\n") == 1
    assert set(COMMON_KEYS) <= answer.line.keys()
    assert answer.line["ok"] is True
    assert answer.line["error"] is None
    assert answer.line["ppl"] == 24.497366123456789, "the digits read back to the same float"
    assert answer.line["numerics"] == engine.NUMERICS
    assert "24.4974" in answer.stderr, "people are told too"


def test_what_json_cannot_say_is_null(pagemill, pipeline) -> None:
    pipeline.answer |= {"ppl": math.nan, "byte_ppl": math.inf, "rows": [{"p": -math.inf}]}
    line = pagemill(*GIVEN).line
    assert (line["ppl"], line["byte_ppl"], line["rows"]) == (None, None, [{"p": None}])


def test_an_incomplete_run_exits_with_3_and_says_why(pagemill, pipeline) -> None:
    error = {"type": "IncompleteError", "message": "1 of 6 shards was set aside", "hint": "run it again"}
    pipeline.answer |= {"exit_code": 3, "ok": False, "ppl": None, "error": error}
    answer = pagemill(*GIVEN)
    assert (answer.exit_code, answer.line["ok"], answer.line["error"]) == (3, False, error)
    assert "1 of 6 shards was set aside" in answer.stderr


@pytest.mark.parametrize(
    ("error", "exit_code", "kind"),
    [
        (errors.SettingsError("no", "hint"), 2, "SettingsError"),
        (errors.ClusterUnreachable("no", "hint"), 2, "ClusterUnreachable"),
        (errors.IncompleteError("no", "hint"), 3, "IncompleteError"),
        (errors.ModelError("no", "hint", kind="GGUFFormatError"), 2, "GGUFFormatError"),
        (engine.UnsupportedQuant("no"), 2, "UnsupportedQuant"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "m.gguf"), 2, "FileNotFoundError"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 3, "OSError"),
        (RuntimeError("no"), 4, "RuntimeError"),
        (errors.PipelineError("no"), 4, "PipelineError"),
        (AssertionError(), 4, "AssertionError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (SystemExit(int(signal.SIGTERM)), 130, "Interrupted"),
    ],
)
def test_every_failure_has_its_exit_code_and_a_json_line(error, exit_code, kind, pagemill, pipeline) -> None:
    pipeline.raises = error
    answer = pagemill(*GIVEN)
    assert (answer.exit_code, answer.line["exit_code"]) == (exit_code, exit_code)
    assert answer.line["ok"] is False
    assert answer.line["error"]["type"] == kind
    assert answer.line["error"]["message"]
    assert answer.line["error"]["hint"] or kind == "UnsupportedQuant"
    assert set(COMMON_KEYS) <= answer.line.keys()
    assert answer.stdout.count("\n") == 1
    assert "Traceback" not in answer.stderr


def test_a_bugs_traceback_is_kept_in_a_named_file(pagemill, pipeline, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    pipeline.raises = ZeroDivisionError("division by zero")
    answer = pagemill(*GIVEN)
    (kept,) = (tmp_path / "results").iterdir()
    assert kept.name in answer.line["error"]["hint"]
    assert "ZeroDivisionError: division by zero" in kept.read_text()


def test_a_traceback_is_shown_when_asked_for(pagemill, pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_DEBUG", "1")
    pipeline.raises = ZeroDivisionError("division by zero")
    assert "Traceback (most recent call last)" in pagemill(*GIVEN).stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["perplexiy"], "perplexity"),
        (["perplexity", "protocol.windw=256"], "protocol.window"),
        (["perplexity", "window=256"], "protocol.window"),
        (["perplexity", "protocl.limit=8"], "protocol.limit"),
        (["perplexity", "+engine.thread=2"], "engine.threads"),
        (["perplexity", "clustr=inline"], "cluster"),
        (["perplexity", "data=wikitext"], "wikitext2"),
        (["perplexity", "experiment=dmo"], "demo"),
        (["perplexity", "model.path"], "model.path"),
        (["perplexity", "protocol.window=many"], "Integer"),
        (["perplexity", "protocol.window=1,2"], "--multirun"),
        (["perplexity", "protocol={window:"], "protocol"),
        (["perplexity", "--limit"], "--limit"),
        (["perplexity"], "model.path"),
        (["perplexity", "model.path=null", "data.path=x"], "model.path"),
    ],
)
def test_what_cannot_be_read_is_refused_naming_the_nearest(words, told, pagemill, pipeline) -> None:
    answer = pagemill(*words)
    assert answer.exit_code == 2
    assert told in answer.line["error"]["message"] + answer.line["error"]["hint"]
    assert not pipeline.seen
    assert "Traceback" not in answer.stderr


def test_an_empty_command_line_is_refused(pagemill) -> None:
    assert pagemill("").exit_code == 2


def test_multirun_tells_every_run_in_one_line(pagemill, pipeline) -> None:
    answer = pagemill(*GIVEN, "--multirun", "protocol.window=128,256")
    assert [settings.protocol.window for settings in pipeline.seen] == [128, 256]
    assert answer.exit_code == 0
    assert [run["ppl"] for run in answer.line["runs"]] == [pipeline.answer["ppl"]] * 2
    assert answer.stdout.count("\n") == 1


def test_a_command_leaves_nothing_in_the_current_folder(pagemill, pipeline, tmp_path: Path) -> None:
    pagemill(*GIVEN)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_the_line_reaches_standard_output() -> None:
    process = start(CHATTER, *GIVEN)
    out, err = process.communicate(timeout=60)
    assert json.loads(out)["ppl"] == 0.1 + 0.2
    assert out.count("\n") == 1
    for source in ("print", "the descriptor", "a child", "an exit handler"):
        assert f"from {source}" in err


@pytest.mark.parametrize("closing", ["1>&-", "2>&-", "1>&- 2>&-", "| true"])
def test_closed_streams_do_not_change_the_exit_code(closing: str) -> None:
    command = f'set -o pipefail; "$@" {closing}'
    code = HARNESS.replace("{body}", CHATTER.strip())
    shell = ["bash", "-c", command, "bash", sys.executable, "-c", code, *GIVEN]
    assert subprocess.run(shell, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_130_and_the_line(number: signal.Signals, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    process = start(f"import time; open({str(begun)!r}, 'w').close(); time.sleep(60)", *GIVEN)
    deadline = time.monotonic() + 30
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out)["error"]["type"] == "Interrupted"
    assert "Traceback" not in err


def test_the_module_and_the_console_script_answer_alike() -> None:
    script = Path(sys.executable).with_name("pagemill")
    ways = [[sys.executable, "-m", "jobs.perplexity"]]
    ways += [[str(script), "perplexity"]] if script.exists() else []
    for way in ways:
        done = subprocess.run([*way, "protocol.windw=1"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "protocol.window" in json.loads(done.stdout)["error"]["hint"]


@pytest.mark.alone
@pytest.mark.parametrize("words", [["--help"], ["perplexity", "--help"]])
def test_help_answers_at_once(words: list[str]) -> None:
    # Under a second is the promise; three times that here, since CI's two cores may be busy.
    took = []
    for _ in range(3):
        began = time.monotonic()
        code = "import sys; from jobs import cli; sys.exit(cli.run(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
        )
        took.append(time.monotonic() - began)
        assert done.returncode == 0
        assert "pagemill" in done.stdout
    assert min(took) < 3 * 1.0


def test_the_command_line_imports_nothing_heavy() -> None:
    code = """
import sys
from jobs import cli
for words in (["--help"], ["perplexity", "--help"], ["perplexity", "--cfg", "job"], ["perplexity", "x=1"]):
    cli.run(words)
heavy = {"ray", "mlflow", "numba", "pyarrow", "tokenizers", "pandas"} & sys.modules.keys()
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_hydras_questions_are_answered_on_standard_output() -> None:
    base = [sys.executable, "-m", "jobs.perplexity"]
    shown = subprocess.run(
        [*base, "experiment=demo", "--cfg", "job"], capture_output=True, text=True, timeout=60
    )
    assert "limit: 6" in shown.stdout
    tree = subprocess.run([*base, "--info", "defaults-tree"], capture_output=True, text=True, timeout=60)
    assert "perplexity_schema" in tree.stdout
    wrong = subprocess.run([*base, "--cfg", "job", "data=wiki"], capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, "wikitext2" in wrong.stderr) == (2, True)


def test_settings_are_plain_dataclasses_below_the_job(pagemill, pipeline) -> None:
    pagemill(*GIVEN, "protocol.limit=8", "cluster=inline", "tracking=none")
    (settings,) = pipeline.seen
    assert type(settings).__name__ == "PerplexitySettings"
    assert (settings.protocol.limit, settings.cluster.kind, settings.tracking.kind) == (8, "inline", "none")
