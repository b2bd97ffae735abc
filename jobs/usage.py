"""`pagemill JOB --help`: groups, keys, defaults and what they mean, read from the schema and from conf/.

Hydra's own help composes the config and lists every plugin, which takes most of a second; this a quarter.
"""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import conf
from jobs import schema

_ENTRY = re.compile(r"^(?P<indent>\s*)(?P<key>\w+):[^#]*?(?:#\s*(?P<comment>.*))?$")
_DEFAULT = re.compile(r"^\s*- (?P<group>\w+)(?P<package>@\w+)?: (?P<option>\w+)", re.MULTILINE)
_COMMAND = re.compile(r"pagemill (?P<job>\w+)")

_TAIL = """\
Flags
  --cfg job                   print the resolved config and stop
  --info defaults-tree        print where each value comes from and stop
  --multirun, -m              key=a,b runs one after the other
  --hydra-help                everything else that Hydra can do
"""


def text(job: str) -> str:
    """The help page of a job."""
    module = import_module(f"jobs.{job}")
    root = Path(conf.__path__[0])
    found = list(_DEFAULT.finditer((root / f"{job}.yaml").read_text(encoding="utf-8")))
    defaults = {match["group"]: match["option"] for match in found}
    names = {match["group"]: match["group"] + (match["package"] or "") for match in found}
    parts = [f"pagemill {job} key=value ...", (module.__doc__ or "").strip()]
    parts += [_groups(job, root, defaults, names)] if defaults.keys() & schema.groups().keys() else []
    parts += [_keys(module.SCHEMA, _comments(job, root)), _TAIL]
    return "\n\n".join(parts)


def job_of(file: Path) -> str:
    """The job of the command that a config file opens with."""
    match = _COMMAND.search(file.read_text(encoding="utf-8"))
    return "" if match is None else match["job"]


def _groups(job: str, root: Path, defaults: dict[str, str], names: dict[str, str]) -> str:
    lines = ["Choices, GROUP=NAME; * is the default"]
    for group, options in schema.groups().items():
        if group not in defaults:
            continue
        lines.append(f"  {names[group]}")
        for option in options:
            if group == "experiment" and job_of(root / group / f"{option}.yaml") != job:
                continue
            star = "*" if defaults.get(group) == option else " "
            lines.append(f"  {star} {option:<13}{_purpose(root / group / f'{option}.yaml')}")
    return "\n".join(lines)


def _purpose(file: Path) -> str:
    """What a config file says of itself, below the command that it opens with."""
    comments = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line[:2] == "# "]
    return [line for line in comments if not line.startswith("@")][1]


def _comments(job: str, root: Path) -> dict[str, str]:
    """What conf/ says beside its keys; the first option that says something speaks for a key."""
    found: dict[str, str] = {}
    for group, options in schema.groups().items():
        for option in options:
            _read_comments(root / group / f"{option}.yaml", f"{group}.", found)
    _read_comments(root / f"{job}.yaml", "", found)
    return found


def _read_comments(file: Path, prefix: str, found: dict[str, str]) -> None:
    outer = ""
    for entry in filter(None, map(_ENTRY.match, file.read_text(encoding="utf-8").splitlines())):
        outer = outer if entry["indent"] else f"{entry['key']}."
        if entry["comment"]:
            key = prefix + (outer if entry["indent"] else "") + entry["key"]
            found.setdefault(key, entry["comment"])


def _keys(settings: type, comments: dict[str, str]) -> str:
    lines = ["Keys with their defaults; ??? must be given"]
    for key in schema.keys(settings):
        written = f"{key}={_shown(_default(settings, key))}"
        lines.append(f"  {written:<42}{comments.get(key, '')}".rstrip())
    return "\n".join(lines)


def _default(settings: type, key: str) -> Any:
    """A key's default, without making an instance: required keys have none."""
    head, _, rest = key.partition(".")
    field = next(field for field in dataclasses.fields(settings) if field.name == head)
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return attrgetter(rest)(value) if rest else value
    return field.default


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).encode("unicode_escape").decode() if isinstance(value, str) else str(value)
