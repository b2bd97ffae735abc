"""Which measurement of a baseline is which of today's, where a check was given another model or another text.

A measurement is found by check, variant and data. A check that now names another model file has another
variant, and is still the same check: what it measured then is what it is judged against, or refused for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline.regression.outcome import Baseline, Measured

Id = tuple[str, str, str]


def aligned(baseline: Baseline, ids: Sequence[Id]) -> Baseline:
    """The baseline with its measurements called as today's are.

    Those of a check with other names are matched where there is no doubt: by their data when there was one
    variant and is one, by their variants when there was one data set and is one, or when there is one each.

    Args:
        ids: of what is measured today.
    """
    known = {then.id for then in baseline.measured}
    names: dict[Id, Id] = {}
    for check in dict.fromkeys(check for check, _, _ in ids):
        new = [now for now in ids if now[0] == check and now not in known]
        old = [then.id for then in baseline.measured if then.check == check and then.id not in ids]
        for part, other in ((1, 2), (2, 1)):
            if len({then[part] for then in old}) == 1 == len({now[part] for now in new}):
                names |= _matched(old, new, other)
        if len(old) == 1 == len(new):
            names[old[0]] = new[0]
    return replace(baseline, measured=[_named(then, names) for then in baseline.measured])


def _matched(old: Iterable[Id], new: Iterable[Id], part: int) -> dict[Id, Id]:
    by_name = {now[part]: now for now in new}
    return {then: by_name[then[part]] for then in old if then[part] in by_name}


def _named(then: Measured, names: dict[Id, Id]) -> Measured:
    if then.id not in names:
        return then
    _, variant, data = names[then.id]
    return replace(then, variant=variant, data=data)
