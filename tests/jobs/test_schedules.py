"""What starts the gate every night: cron, systemd, a workflow, Kubernetes; as far as can be tried here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.jobs.fake_gate import NIGHTLY, ROOT, Gate, name_of

FOLDER = NIGHTLY.parent
README = (FOLDER / "README.md").read_text()
OPENING = NIGHTLY.read_text().partition("set -Eeuo")[0]  # says what is read from the environment
BASH = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_the_script_and_the_recipes_are_good_bash() -> None:
    assert os.access(NIGHTLY, os.X_OK)
    subprocess.run(["bash", "-n", str(NIGHTLY)], check=True)
    assert BASH
    for block in BASH:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for path in re.findall(r"jobs/schedules/[\w.-]+\w", block):
            assert (ROOT / path).is_file(), path


def settings() -> dict[str, str]:
    """Of nightly.env, those that are commented out as well."""
    lines = (FOLDER / "nightly.env").read_text().splitlines()
    return dict(line.lstrip("#").split("=", 1) for line in lines if re.match(r"#?[A-Z_]+=", line))


def test_settings_are_the_scripts_and_mean_the_same_to_a_shell_and_to_systemd() -> None:
    choices = "".join(path.read_text() for path in (ROOT / "conf").rglob("*.yaml"))
    known = re.findall(r"^#   ([A-Z_]+) ", OPENING, re.MULTILINE)
    known += re.findall(r"oc\.env:([A-Z0-9_]+)", choices)
    assert settings().keys() <= set(known)
    for value in settings().values():
        assert re.fullmatch(r"[\w/.:-]+", value), "nothing that either would read in its own way"


def cron_line() -> tuple[list[str], str]:
    """The five fields and the command."""
    lines = (FOLDER / "pagemill.cron").read_text().splitlines()
    mail, line = (line for line in lines if line and line[0] != "#")
    assert re.fullmatch(r"MAILTO=\w+", mail)
    *fields, command = line.split(None, 5)
    return fields, command


def test_the_cron_line_is_one(tmp_path: Path) -> None:
    fields, command = cron_line()
    ranges = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]
    for value, (least, most) in zip(fields, ranges, strict=True):
        assert value == "*" or least <= int(value) <= most
    assert "%" not in command, "cron would end the command there"
    assert len(command) < 999
    assert "set -a; . /etc/pagemill/nightly.env; " in command
    table = FOLDER / "pagemill.cron"
    if shutil.which("crontab"):
        checks = [subprocess.run(["crontab", o, str(table)], capture_output=True) for o in ("-T", "-n")]
        assert 0 in [check.returncode for check in checks], [check.stderr for check in checks]


def test_crons_command_is_silent_when_all_is_well_and_says_where_to_look_when_not(gate: Gate) -> None:
    """By `sh`, with nearly no environment, as cron starts it."""
    _, command = cron_line()
    env = gate.folder / "nightly.env"
    names = ("PAGEMILL_BIN", "PAGEMILL_RESULTS", "PAGEMILL_GIT_SHA")
    env.write_text("".join(f"{name}={gate.environment[name]}\n" for name in names))
    command = command.replace("/etc/pagemill/nightly.env", str(env)).replace("/opt/pagemill-src", str(ROOT))
    command = command.replace("/var/log/pagemill/nightly.log", f"{gate.folder}/cron.log")
    gate.say(3, 0)
    mails = [
        subprocess.run(["sh", "-c", command], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [mail.stderr for mail in mails] == ["", ""]
    assert mails[0].stdout == f"pagemill nightly: exit code 3, see {gate.folder}/cron.log\n"
    assert mails[1].stdout == ""
    assert f"{name_of(2)} ended with exit code 0" in "".join(gate.lines("cron.log"))


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    service = (FOLDER / "pagemill-nightly.service").read_text()
    timer = (FOLDER / "pagemill-nightly.timer").read_text()
    assert "ExecStart=/opt/pagemill-src/jobs/schedules/nightly.sh nightly\n" in service
    assert "RestartPreventExitStatus=1 2 4\n" in service, "no verdict is asked for again"
    assert "Persistent=yes\n" in timer
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    (tmp_path / "pagemill-nightly.service").write_text(service.replace("/opt/pagemill-src", str(ROOT)))
    (tmp_path / "pagemill-nightly.timer").write_text(timer)
    units = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (when,) = re.findall(r"^OnCalendar=(.*)$", timer, re.MULTILINE)
    subprocess.run(["systemd-analyze", "calendar", when], check=True, capture_output=True)


def read(name: str) -> dict[str, Any]:
    """A YAML file of ours; GitHub's key `on` is a truth to YAML 1.1."""
    found: dict[Any, Any] = yaml.safe_load((FOLDER / name).read_text())
    return {"on" if key is True else key: value for key, value in found.items()}


@pytest.fixture
def workflow() -> dict[str, Any]:
    return read("github-nightly.yaml")


def test_the_workflow_runs_the_script_on_a_machine_of_ours_and_keeps_the_verdict(
    workflow: dict[str, Any],
) -> None:
    ((schedule,),) = [workflow["on"]["schedule"]]
    assert schedule["cron"].split() == cron_line()[0]
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"] == {"group": "pagemill-nightly", "cancel-in-progress": False}
    (job,) = workflow["jobs"].values()
    assert "self-hosted" in job["runs-on"]
    checkout, run, upload = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@v")
    assert run["run"] == 'jobs/schedules/nightly.sh "$SUITE"', "values of inputs come by the environment"
    assert upload["uses"].startswith("actions/upload-artifact@v")
    assert upload["if"] == "${{ !cancelled() }}", "a red verdict is kept too"
    assert upload["with"]["path"].endswith("/nightly/latest.*")
    read_by_script = set(re.findall(r"\b(?:PAGEMILL|RAY)_[A-Z_]+\b", OPENING)) | {"SUITE"}
    assert job["env"].keys() <= read_by_script
    assert job["env"]["RAY_AUTH_TOKEN"] == "${{ secrets.PAGEMILL_RAY_TOKEN }}"


def test_the_workflows_step_ends_as_the_gate_does(gate: Gate, workflow: dict[str, Any]) -> None:
    """What GitHub leaves empty is as good as not there."""
    gate.say(1)
    (job,) = workflow["jobs"].values()
    empty = {name: "" for name in job["env"] if name not in gate.environment}
    environment = gate.environment | empty | {"SUITE": "smoke"}
    done = subprocess.run(
        ["bash", "-e", "-c", job["steps"][1]["run"]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert f"{name_of(1, 'smoke')} ended with exit code 1" in done.stderr


def test_the_cron_job_submits_with_a_token_and_does_not_ask_for_a_verdict_twice() -> None:
    job = read("cronjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    spec = job["spec"]
    assert spec["schedule"].split() == cron_line()[0]
    assert spec["concurrencyPolicy"] == "Forbid"
    work = spec["jobTemplate"]["spec"]
    pod = work["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = work["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert (rule["onExitCodes"]["values"], rule["onExitCodes"]["containerName"]) == (
        [1, 2, 4],
        container["name"],
    )
    assert pod["restartPolicy"] == "Never", "as podFailurePolicy wants it"
    assert container["command"] == ["/opt/pagemill-src/jobs/schedules/nightly.sh", "nightly"]
    environment = {entry["name"]: entry for entry in container["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    assert "value" not in environment["RAY_AUTH_TOKEN"]
    assert environment["RAY_API_SERVER_ADDRESS"]["value"].startswith("http://")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert environment["PAGEMILL_RESULTS"]["value"].startswith(mounted["shared"])
    assert "NOT TRIED ON A CLUSTER" in (FOLDER / "cronjob.yaml").read_text()


def test_the_ray_cron_job_is_the_ray_job_with_another_command() -> None:
    job = read("raycronjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayCronJob")
    assert job["spec"].keys() == {"schedule", "jobTemplate"}
    assert job["spec"]["schedule"].split() == cron_line()[0]
    spec = dict(job["spec"]["jobTemplate"])
    known = dict(yaml.safe_load((ROOT / "jobs/deploy/rayjob.yaml").read_text())["spec"])
    assert spec.pop("backoffLimit") == 0, "a red verdict is a job that failed"
    assert spec.pop("activeDeadlineSeconds") < 24 * 3600
    del known["backoffLimit"]
    words = spec.pop("entrypoint").split()
    assert words[:3] == [*known.pop("entrypoint").split()[:2], "jobs.regression"]
    given = dict(word.split("=", 1) for word in words[3:])
    assert given["suite"] == "nightly"
    assert given["paths.results"].startswith("/")
    shipped, wanted = (yaml.safe_load(one.pop("runtimeEnvYAML")) for one in (spec, known))
    assert shipped["env_vars"].pop("PAGEMILL_GIT_SHA")
    assert shipped == wanted
    assert spec == known
    assert "NOT TRIED ON A CLUSTER" in (FOLDER / "raycronjob.yaml").read_text()
