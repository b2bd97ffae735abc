"""Recipes of jobs/README.md and jobs/deploy: whole, small, with a token, on loopback; no Ray is started."""

from __future__ import annotations

import ast
import logging
import os
import re
import stat
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import runtime

ROOT = Path(__file__).parents[2]
README = (ROOT / "jobs/README.md").read_text()
SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "jobs/deploy/runtime_env.yaml").read_text())
RAYJOB: dict[str, Any] = yaml.safe_load((ROOT / "jobs/deploy/rayjob.yaml").read_text())


def recipes(language: str) -> list[str]:
    """Fenced blocks of the README."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


BASH = recipes("bash")
WITH_RAY = [block for block in BASH if re.search(r"\bray (start|job)|cluster=ray", block)]


def test_what_is_shipped_is_the_code_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Packed by Ray itself; `models` without a slash would leave out engine/models."""
    from ray._private.runtime_env.packaging import create_package

    caplog.set_level(logging.ERROR)
    create_package(str(ROOT), tmp_path / "code.zip", include_gitignore=True, excludes=SHIPPED["excludes"])
    with zipfile.ZipFile(tmp_path / "code.zip") as package:
        names = {entry.filename for entry in package.infolist() if not entry.is_dir()}
        n_bytes = sum(entry.file_size for entry in package.infolist())
    code = {
        str(path.relative_to(ROOT))
        for part in ("engine", "pipeline", "jobs", "conf")
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".py", ".yaml", ".css", ".js")
    }
    assert code <= names
    assert {name.partition("/")[0] for name in names - code} <= {
        "CHANGELOG.md", "Makefile", "README.md", ".gitignore", "pyproject.toml", "jobs", "pipeline", "engine",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".gguf", ".parquet", ".db", ".pyc"))]
    assert n_bytes < 5 << 20


@pytest.mark.parametrize("block", BASH)
def test_every_recipe_is_good_bash(block: str) -> None:
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize("block", WITH_RAY)
def test_every_recipe_that_touches_a_cluster_has_the_token_on(block: str) -> None:
    assert "RAY_AUTH_MODE=token" in block
    assert "RAY_AUTH_TOKEN_PATH=" in block
    assert "disabled" not in block


def test_dashboards_and_mlflow_listen_on_loopback_in_every_recipe() -> None:
    heads = [block for block in BASH if "ray start --head" in block]
    assert heads
    assert all("--dashboard-host=127.0.0.1" in block for block in heads)
    for text in (README, (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()):
        assert "0.0.0.0" not in text
        commands = re.findall(r"mlflow server(?:[^\n]*\\\n)*[^\n]*", text)
        assert all("--host 127.0.0.1" in command for command in commands)
    assert "mlflow server --host 127.0.0.1" in (ROOT / "Makefile").read_text()
    ours = (ROOT / "pipeline/cluster.py").read_text()
    assert "include_dashboard=False" in ours, "a Ray of our own has none"


def test_a_job_names_an_absolute_interpreter_and_absolute_paths() -> None:
    (submit,) = [block for block in BASH if "ray job submit" in block]
    (client,) = recipes("python")
    ast.parse(client)
    assert '"${PAGEMILL_PYTHON:-/opt/pagemill/bin/python}" -m jobs.perplexity' in submit
    assert '"/opt/pagemill/bin/python"), "-m", "jobs.perplexity"' in " ".join(client.split())
    entrypoint = RAYJOB["spec"]["entrypoint"].split()
    assert entrypoint[0].startswith("/")
    given = dict(word.split("=", 1) for word in entrypoint if "=" in word)
    assert all(given[key].startswith("/") for key in ("model.path", "paths.results", "paths.cache"))
    for text in (submit, client):
        assert all(f"{key}=" in text for key in ("model.path", "paths.results", "paths.cache"))
    assert "jobs/deploy/runtime_env.yaml" in submit
    assert "jobs/deploy/runtime_env.yaml" in client


def test_the_token_recipe_leaves_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    """Also where a file with another mode was there, and under a umask that lets others read."""
    (block,) = [block for block in BASH if "secrets.token_hex" in block]
    file = tmp_path / "folder/token"
    for before in (None, 0o644):
        if before is not None:
            file.chmod(before)
        environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(file)}
        subprocess.run(["bash", "-euc", f"umask 022\n{block}"], env=environment, check=True)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert re.fullmatch(r"[0-9a-f]{64}\n", file.read_text())
    sent = [block for block in BASH if "/dev/stdin ~/.ray/pagemill_token" in block]
    assert all("install -D -m 600 /dev/stdin" in block for block in sent)
    assert sent


@pytest.mark.parametrize(("mode", "is_told"), [(0o644, True), (0o640, True), (0o600, False), (0o400, False)])
def test_a_token_file_that_others_can_read_is_told(
    mode: int,
    is_told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "token"
    file.write_text("0" * 64)
    file.chmod(mode)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_NUM_REDIS_GET_RETRIES"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    for name in ("RAY_DEDUP_LOGS", "RAY_DEDUP_LOGS_SKIP_REGEX"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    runtime.prepare_remote_ray()
    assert os.environ["RAY_AUTH_MODE"] == "token", "a token that is there is used"
    assert (f"chmod 600 {file}" in caplog.text) is is_told
    assert "0000" not in caplog.text


def containers() -> list[dict[str, Any]]:
    """Of every pod of the RayJob."""
    spec = RAYJOB["spec"]
    cluster = spec["rayClusterSpec"]
    pods = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    pods += [group["template"] for group in cluster["workerGroupSpecs"]]
    found = [container for pod in pods for container in pod["spec"]["containers"]]
    assert len(found) == 3
    return found


def test_the_ray_job_is_whole() -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    spec = RAYJOB["spec"]
    assert spec["submissionMode"] == "K8sJobMode", "only that one sends the checkout"
    assert "cluster=ray" in spec["entrypoint"].split()
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups[1:])
    for group in groups:
        pod = group["template"]["spec"]
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert "NOT TRIED ON A CLUSTER" in (ROOT / "jobs/deploy/rayjob.yaml").read_text()
    assert "Not tried on a cluster" in README


def test_pods_of_the_ray_job_share_one_image_and_a_token_from_a_secret() -> None:
    assert len({container["image"] for container in containers()}) == 1
    for container in containers():
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
            "name": "pagemill-ray-token",
            "key": "auth_token",
        }
        assert "value" not in environment["RAY_AUTH_TOKEN"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "kubectl create secret generic pagemill-ray-token --from-literal=auth_token=" in README


def test_the_ray_job_ships_what_the_recipe_ships_and_the_installed_ray() -> None:
    shipped = yaml.safe_load(RAYJOB["spec"]["runtimeEnvYAML"])
    assert shipped["excludes"] == SHIPPED["excludes"]
    assert shipped["working_dir"].startswith("/")
    assert all(isinstance(value, str) for value in shipped["env_vars"].values())
    wanted = re.search(r"ray\[default\]>=([\d.]+),<([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert wanted is not None
    low, version, high = (
        tuple(map(int, text.split(".")[:2]))
        for text in (wanted[1], RAYJOB["spec"]["rayClusterSpec"]["rayVersion"], wanted[2])
    )
    assert low <= version < high
