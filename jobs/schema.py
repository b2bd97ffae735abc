"""The keys and groups that a user can set, and which of them a mistyped word was meant to be."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import conf
from jobs.overrides import split_flags

Settings = TypeVar("Settings")


def register(job: str, settings: type[Settings]) -> type[Settings]:
    """Make a settings dataclass the schema that conf/JOB.yaml lists first, as `JOB_schema`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(f"{job}_schema", node=settings, provider=settings.__module__)
    return settings


def groups() -> dict[str, list[str]]:
    """Every group of conf/ with its options."""
    folders = (entry for root in conf.__path__ for entry in sorted(Path(root).iterdir()) if entry.is_dir())
    found = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    return {name: options for name, options in found.items() if options}


def keys(schema: type) -> list[str]:
    """Every key of a settings dataclass, dotted, leaves only."""
    hints = get_type_hints(schema)
    found = []
    for field in dataclasses.fields(schema):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            found += [f"{field.name}.{key}" for key in keys(inner)]
        else:
            found.append(field.name)
    return found


def unknown(values: Any, schema: type, prefix: str = "") -> list[str]:
    """Keys of nested dictionaries that a settings dataclass does not have."""
    hints = get_type_hints(schema)
    found = []
    for name, value in values.items():
        if name not in hints:
            found.append(f"{prefix}{name}")
        elif isinstance(value, dict) and dataclasses.is_dataclass(hints[name]):
            found += unknown(value, hints[name], f"{prefix}{name}.")
    return found


def nearest(word: str, valid: Sequence[str]) -> str:
    """The valid name that is closest to `word`, whole or by its last part; there is always one."""

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    return max(valid, key=likeness)


def explain(schema: type, words: Sequence[str]) -> tuple[str, str] | None:
    """The first word of a command line that names nothing known: what is wrong with it, and what is nearest.

    None when every word names something, and the fault lies elsewhere.
    """
    known_groups, known_keys = groups(), keys(schema)
    for word in split_flags(words)[0]:
        if word.startswith("hydra"):
            continue
        name, equals, value = word.lstrip("+~").partition("=")
        name = name.partition("@")[0]
        if not equals and not word.startswith("~"):
            return (
                f"{word!r} is not of the form key=value",
                f"the nearest key is {nearest(word, [*known_groups, *known_keys])}",
            )
        if name in known_groups:
            options = known_groups[name]
            is_file = name == "suite" and value.endswith((".yaml", ".yml"))
            several = "," in value or "{" in value
            if value and value != "null" and not several and value not in options and not is_file:
                return (
                    f"{name}={value}: there is no such choice",
                    f"did you mean {name}={nearest(value, options)}? (known: {', '.join(options)})",
                )
        elif name.startswith("suite.checks."):  # whose keys are a suite's own
            continue
        elif name not in known_keys and not any(key.startswith(f"{name}.") for key in known_keys):
            return f"unknown key {name}", f"did you mean {nearest(name, [*known_keys, *known_groups])}?"
    return None
