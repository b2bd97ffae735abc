"""The bench with fake engines measures what it says: every shard once, through the real pool."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from jobs import bench_growth
from pipeline import events


def test_the_fake_cluster_has_every_shard_done_once() -> None:
    done = Counter[events.Value]()

    def count(event: events.Event) -> None:
        if event.name == events.SHARD_DONE:
            done[event.fields["shard"]] += 1

    with events.listening(count):
        costs = bench_growth.scheduling(25, 200)
    assert done == {first * bench_growth.PER_SHARD: 1 for first in range(200)}
    assert all(cost > 0 for cost in costs.values())


def test_planning_and_committing_are_measured() -> None:
    assert bench_growth.planning(1000)["plan_s"] > 0
    assert min(bench_growth.committing(3).values()) > 0


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_is_that_of_the_costs(power: float) -> None:
    sizes = (10, 100, 1000)
    assert bench_growth.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)
    assert math.isnan(bench_growth.exponent(sizes, [0.0, 1.0, 2.0]))
