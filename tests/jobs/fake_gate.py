"""jobs/schedules/nightly.sh among stand-ins for the interpreter and for Ray."""

from __future__ import annotations

import datetime
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NIGHTLY = ROOT / "jobs/schedules/nightly.sh"
COMMIT = "0123456789abcdef"

PYTHON = """#!/bin/bash
# Stands for the interpreter: `-m jobs.regression` ends as the next line of codes says.
if [[ $1 != -m ]]; then exec {python} -S -E "$@"; fi
printf '%s\\n' "$*" >>{fake}/calls
printf '%s\\n' "${{PAGEMILL_GIT_SHA-}}" >>{fake}/commits
echo $$ >{fake}/began
while [[ -e {fake}/hold ]]; do /bin/sleep 0.02; done
read -r code <{fake}/codes
sed -i 1d {fake}/codes
echo 'a line of the log'
[[ $code != none ]] || exit 137
files='"junit": "{fake}/j.xml", "summary": "{fake}/s.md"'
printf '{{"job": "regression", "exit_code": %d, %s}}\\n' "$code" "$files"
exit "$code"
"""
RAY = """#!/bin/bash
# Stands for `ray job`: a job is over as soon as it was submitted.
printf '%s\\n' "$*" >>{fake}/ray
verb=$2
shift 4  # job VERB --address URL
case $verb in
submit)
    id=$2
    if [[ -e {fake}/$id.out ]]; then
        echo "RuntimeError: Job with submission_id $id already exists."
        exit 1
    fi
    while [[ $1 != -- ]]; do shift; done
    shift
    "$@" >{fake}/"$id".out && state=succeeded || state=failed
    echo "Job '$id' $state" >{fake}/"$id".state
    ;;
logs) cat "{fake}/${{*: -1}}.out" ;;
status)
    if [[ -s {fake}/silences ]]; then sed -i 1d {fake}/silences; exit 1; fi
    cat "{fake}/$1.state" ;;
esac
"""


@dataclass
class Gate:
    """nightly.sh among stand-ins, and what it left."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        names = {"fake": self.folder, "python": sys.executable}
        for name, text in [("python", PYTHON), ("ray", RAY)]:
            self.command(name, text.format(**names))
        self.command("sleep", f"#!/bin/bash\necho $1 >>{self.folder}/slept\n")
        self.environment |= {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "PAGEMILL_BIN": f"{self.folder}/bin",
            "PAGEMILL_RESULTS": f"{self.folder}/results",
            "PAGEMILL_GIT_SHA": COMMIT,
        }
        self.say(0)

    def command(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def say(self, *codes: int | str) -> None:
        """How the next gates end."""
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(NIGHTLY), *words],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, standard output and error."""
        process = self.start(*words, **environment)
        out, error = process.communicate(timeout=30)
        return process.returncode, out, error

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def on_cluster(self) -> None:
        token = self.folder / "token"
        token.write_text("0" * 64)
        token.chmod(0o600)
        self.environment |= {
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }


def name_of(number: int, suite: str = "nightly", commit: str = COMMIT) -> str:
    """Of today's tries."""
    return f"pagemill-{suite}-{datetime.datetime.now(datetime.UTC):%Y%m%d}-{commit[:12]}-{number}"
