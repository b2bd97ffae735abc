"""From `sweep={key: [values], ...}` to the settings of every point.

A key is a group (`data: [wikitext2, mine]`) or a setting (`protocol.window: [512, 2048]`). Hydra composes
once for each combination of group choices, which takes a third of a second; settings are then put into the
dataclasses, which takes nothing. A setting's value therefore wins over whatever a group's file says, and is
not seen by interpolations in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from jobs import schema
from pipeline.errors import SettingsError
from pipeline.settings import logged

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from pipeline.settings import PerplexitySettings
    from pipeline.sweep import Point

GROUPS = ("model", "data", "protocol", "engine")
"""What may differ between points; cluster, tracking and paths are one for all."""
_POOLS_OWN = ("engine.threads",)
_EXAMPLE = "expected for example 'sweep={data:[wikitext2,pydoc],protocol.window:[512,2048]}'"


def expand(cfg: DictConfig, settings: type[PerplexitySettings]) -> list[Point]:
    """All points of the config's sweep, in the order of its axes.

    A combination that cannot be composed, or lacks a required key, is a point with an error.

    Raises:
        SettingsError: an axis that is unknown, empty or no list, or a value of the wrong type.
    """
    from omegaconf import OmegaConf

    from pipeline.sweep import Point

    axes = cast(dict[str, Any], OmegaConf.to_container(cfg.sweep, resolve=True))
    _check(axes, schema.keys(settings))
    leaves = {key: _converted(key, values, settings) for key, values in axes.items() if "." in key}
    composed: dict[tuple[Any, ...], PerplexitySettings | SettingsError] = {}
    points = []
    for values in itertools.product(*(range(len(axis)) for axis in axes.values())):
        point = {key: axes[key][i] for key, i in zip(axes, values, strict=True)}
        choices = {key: value for key, value in point.items() if "." not in key}
        chosen = tuple(choices.values())
        if chosen not in composed:
            composed[chosen] = _composed(cfg, choices, leaves, settings)
        base = composed[chosen]
        if isinstance(base, SettingsError):
            points.append(Point(logged(point), None, base))
            continue
        for key, i in zip(axes, values, strict=True):
            if key in leaves:
                base = _with(base, key, leaves[key][i])
        points.append(Point(logged(point), base))
    return points


def _check(axes: Mapping[str, Any], known: Sequence[str]) -> None:
    settings = [key for key in known if key.partition(".")[0] in GROUPS and key not in _POOLS_OWN]
    for key, values in axes.items():
        if key not in settings and key not in GROUPS:
            if key in known or key in schema.groups():
                raise SettingsError(
                    f"sweep: {key} is one for all points of a sweep, which share their workers",
                    "--multirun runs one point after the other, with workers of its own each",
                )
            raise SettingsError(
                f"sweep: unknown key {key}", f"did you mean {schema.nearest(key, [*settings, *GROUPS])}?"
            )
        if not isinstance(values, list):
            raise SettingsError(f"sweep: {key}={values} is no list of values", _EXAMPLE)
        if not values:
            raise SettingsError(f"sweep: {key} has no values, so there are no points", _EXAMPLE)
        if key in GROUPS and not all(isinstance(value, str) for value in values):
            raise SettingsError(f"sweep: {key}={values} are not names of choices", _EXAMPLE)


def _converted(key: str, values: Sequence[Any], settings: type) -> list[Any]:
    """Values as the schema's type for that key has them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = OmegaConf.structured(settings)
    found = []
    for value in values:
        try:
            OmegaConf.update(node, key, value, merge=False)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise SettingsError(f"sweep: {key}={value}: {reason}", "give another value") from error
        held = OmegaConf.select(node, key)
        found.append(OmegaConf.to_container(held) if OmegaConf.is_config(held) else held)
    return found


def _composed(
    cfg: DictConfig,
    choices: Mapping[str, str],
    leaves: Mapping[str, Sequence[Any]],
    settings: type[PerplexitySettings],
) -> PerplexitySettings | SettingsError:
    """The settings of some choices, with one value of every other axis; or why there are none."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from jobs.outcome import Outcome

    if choices:
        name = HydraConfig.get().job.config_name
        words = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] not in choices]
        try:
            cfg = compose(name, overrides=[*words, *(f"{key}={value}" for key, value in choices.items())])
        except (HydraException, OmegaConfBaseException) as error:
            told = schema.explain(settings, [f"{key}={value}" for key, value in choices.items()])
            message, hint = told or (str(error).splitlines()[0], "")
            return SettingsError(message, hint)
    cfg = cfg.copy()
    cfg.sweep = {}
    for key, values in leaves.items():
        OmegaConf.update(cfg, key, values[0], merge=False)
    try:
        return Outcome().begin(cfg, settings)
    except SettingsError as error:
        return error


def _with(settings: Any, key: str, value: Any) -> Any:
    """A copy of nested dataclasses with one key changed."""
    head, _, rest = key.partition(".")
    return replace(settings, **{head: _with(getattr(settings, head), rest, value) if rest else value})
