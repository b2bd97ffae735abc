"""From the checks of a suite to settings, composed as on each job's own command line.

    set: {model: smollm2, data: pydoc, protocol.limit: 4, bench: {repeats: 5}}

A key is a group with one of its choices, or a setting, dotted or nested. Hydra composes the groups; settings
are then put into what it made, so that no value has to be written in its grammar. All problems of all checks
are told at once.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import schema
from pipeline.bench.players import PEERS
from pipeline.bench.settings import ThroughputSettings
from pipeline.bench.work import cases
from pipeline.errors import PipelineError, SettingsError
from pipeline.regression import limits as bounds
from pipeline.regression import suite as suites
from pipeline.regression.settings import RegressionSettings
from pipeline.settings import nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

KEYS = ("job", "set", "limits", "trace")
FILE_ENDINGS = (".yaml", ".yml")

_DEFAULT = re.compile(r"^\s*- (?:override )?(\w+(?:@\w+)?): ", re.MULTILINE)
_NAME = re.compile(r"\w[\w-]*")
_HINT = "correct the suite's file, or suite.checks.NAME.set.KEY=VALUE on the command line"


def with_file(words: Sequence[str]) -> list[str]:
    """The words, with `suite=FILE.yaml` made a choice that Hydra knows.

    Raises:
        SettingsError: the file cannot be read, or is no mapping.
    """
    return [_with_file(word) for word in words]


def name_file(error: Exception, words: Sequence[str]) -> None:
    """Have an error's hint call the suite as the words did, where that was by its file."""
    file = next((word for word in words if word.startswith("suite=") and word.endswith(FILE_ENDINGS)), None)
    if file is not None and isinstance(error, PipelineError):
        error.hint = re.sub(r"suite=[\w-]+", lambda _: shlex.quote(file), error.hint)


def checks(settings: RegressionSettings) -> list[suites.Check]:
    """The suite's checks in its order.

    Raises:
        SettingsError: naming every problem of every check.
    """
    found, problems = [], []
    for name, told in settings.suite.checks.items():
        check, wrong = _check(str(name), told, settings)
        problems += wrong
        if check is not None:
            found.append(check)
    if problems:
        many = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        message = f"suite {settings.suite.name} has {many}:\n  " + "\n  ".join(problems)
        raise SettingsError(message, _HINT)
    return found


def _with_file(word: str) -> str:
    key, equals, value = word.partition("=")
    value = value[1:-1] if value[:1] in ("'", '"') and value[-1:] == value[:1] else value
    if key.lstrip("+") != "suite" or not equals or not value.endswith(FILE_ENDINGS):
        return word
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    path = Path(value).expanduser()
    try:
        node = OmegaConf.load(path)
    except OSError as error:
        raise SettingsError(
            f"suite={value}: {error.strerror or error}",
            f"give a file, or one of {', '.join(schema.groups()['suite'])}",
        ) from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise SettingsError(f"suite={value} is no YAML: {told}", "look at conf/suite/smoke.yaml") from error
    if not isinstance(node, DictConfig) or "checks" not in node:
        raise SettingsError(
            f"suite={value} has no checks", "expected name: and checks:, as conf/suite/smoke.yaml"
        )
    if "name" not in node:
        node["name"] = path.stem
    choice = f"file_{path.stem}"
    ConfigStore.instance().store(choice, group="suite", node=node, provider=str(path))
    return f"{key}={choice}"


def _check(name: str, told: Any, of: RegressionSettings) -> tuple[suites.Check | None, list[str]]:
    """A check, or what is wrong with it."""
    problems = []
    if not _NAME.fullmatch(name):
        problems.append(f"{name!r} is no name of a check; expected letters, digits, _ and -")
    if not isinstance(told, Mapping):
        return None, [*problems, f"{name}: expected job, set and limits, found {told!r}"]
    problems += [f"{name}: {key} is not known{nearest(str(key), KEYS)}" for key in told if key not in KEYS]
    job = told.get("job")
    if job is None:
        others = [other for other in of.suite.checks if other != name and "job" in of.suite.checks[other]]
        meant = f"; did you mean the check {schema.nearest(name, others)}?" if others else ""
        return None, [*problems, f"{name}: job is not set; give one of {', '.join(bounds.JOBS)}{meant}"]
    if job not in bounds.JOBS:
        return None, [*problems, f"{name}: job {job} is not known{nearest(str(job), bounds.JOBS)}"]
    n_traced = told.get("trace", 0 if job == "throughput" else 1)
    if not isinstance(n_traced, int) or isinstance(n_traced, bool) or n_traced < 0:
        problems.append(f"{name}: trace: {n_traced} is no number of windows; expected 0 or more")
    given, wrong = _flat(name, told.get("set") or {}, job)
    problems += wrong
    settings = None
    if not wrong:
        settings, wrong = _composed(name, job, given)
        problems += wrong
    tests = [case.name for case in cases(settings.bench)] if isinstance(settings, ThroughputSettings) else []
    peers = settings.peer if isinstance(settings, ThroughputSettings) else []
    read: tuple[bounds.Limit, ...] = ()
    if settings is not None or job != "throughput":  # whose tests and peers are not known otherwise
        limits = told.get("limits") or {}
        if isinstance(limits, Mapping):
            read, wrong = bounds.limits_of(name, job, limits, tests=tests, peers=peers)
        else:
            wrong = [f"{name}: limits: expected metrics with their bounds, found {limits!r}"]
        problems += wrong
    if settings is None or problems:
        return None, problems
    there = {peer: find_spec(peer) is not None for peer in PEERS}
    settings, remarks = suites.without_absent_peers(suites.bound(settings, given, of), there)
    remarks = [f"{name}: {remark}" for remark in remarks]
    return suites.Check(name, job, settings, read, n_traced, suites.says(settings), given, remarks), []


def _flat(name: str, told: Any, job: str) -> tuple[dict[str, Any], list[str]]:
    """`set` with every key dotted, and what it may not have; what is dotted wins over what is nested."""
    if not isinstance(told, Mapping):
        return {}, [f"{name}: set: expected keys of {job}, found {told!r}"]
    groups, known = _groups(job), schema.keys(_schema(job))
    flat: dict[str, Any] = {}

    def put(prefix: str, values: Mapping[Any, Any]) -> None:
        for key, value in values.items():
            path = f"{prefix}{key}"
            if isinstance(value, Mapping) and path not in known:
                put(f"{path}.", value)
            else:
                flat[path] = value

    nested = {key: value for key, value in told.items() if isinstance(value, Mapping)}
    put("", nested)
    put("", {key: value for key, value in told.items() if key not in nested})
    problems = []
    for key in flat:
        head = key.partition(".")[0].partition("@")[0]
        if head in suites.BARRED and key not in suites.ALLOWED:
            problems.append(f"{name}: set.{key} {suites.BARRED[head]}")
        elif key in groups or key in known:
            continue
        elif key in {known_key.rpartition(".")[0] for known_key in known}:
            problems.append(f"{name}: set.{key}={flat[key]} is no choice of {job}'s; give set.{key}.KEY")
        else:
            able = [k for k in (*groups, *known) if k.partition(".")[0] not in suites.BARRED]
            problems.append(
                f"{name}: set.{key} is not a key of {job}; did you mean "
                f"{schema.nearest(key, [*able, *suites.ALLOWED])}?"
            )
    return flat, problems


def _composed(name: str, job: str, given: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The settings that a job would have on its command line."""
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from jobs.outcome import Outcome

    groups = _groups(job)
    words = [f"{key}={value}" for key, value in given.items() if key in groups]
    try:
        cfg: DictConfig = compose(job, overrides=words)
    except (HydraException, OmegaConfBaseException) as error:
        message, hint = schema.explain(_schema(job), words) or (str(error).splitlines()[0], "")
        return None, [f"{name}: set: {message}{f'; {hint}' if hint else ''}"]
    problems = []
    for key, value in given.items():
        if key in groups:
            continue
        try:
            OmegaConf.update(cfg, key, value, merge=False)
        except OmegaConfBaseException as error:
            problems.append(f"{name}: set.{key}={value}: {str(error).splitlines()[0]}")
    if problems:
        return None, problems
    try:
        return Outcome().begin(cfg, _schema(job)), []
    except (SettingsError, OmegaConfBaseException) as error:
        told = str(error).splitlines()[0]
        return None, [f"{name}: {told.replace(' is not set', ' is not set; give it in `set`')}"]


def _groups(job: str) -> list[str]:
    """Groups as a job's command line names them: `model`, or `model@base`."""
    import conf

    text = (Path(conf.__path__[0]) / f"{job}.yaml").read_text(encoding="utf-8")
    own = schema.groups()
    return [name for name in _DEFAULT.findall(text) if name.partition("@")[0] in own]


def _schema(job: str) -> type:
    """The job's settings; importing it makes them known to Hydra."""
    found: type = import_module(f"jobs.{job}").SCHEMA
    return found
