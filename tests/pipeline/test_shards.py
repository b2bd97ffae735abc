"""Shards: every window in exactly one, in order, whatever their size."""

import pytest

from pipeline.shards import Shard, first_window_of, plan


@pytest.mark.parametrize("n_windows", [1, 2, 7, 8, 592])
@pytest.mark.parametrize("per_shard", [1, 3, 4, 1000])
def test_shards_cover_every_window_once_in_order(n_windows, per_shard):
    shards = plan(n_windows, per_shard)
    covered = [w for shard in shards for w in range(shard.first_window, shard.first_window + shard.n_windows)]
    assert covered == list(range(n_windows))
    assert all(shard.n_windows == per_shard for shard in shards[:-1])


def test_names_are_the_first_window_in_eight_digits():
    shard = Shard(592, 4)
    assert shard.file_name == "shard-00000592.parquet"
    assert shard.id == first_window_of(shard.file_name) == 592
    for name in ("shard-592.parquet", "shard-00000592.parquet.tmp", ".shard-00000592.parquet", "plan.json"):
        assert first_window_of(name) is None


@pytest.mark.parametrize(("n_windows", "per_shard"), [(0, 4), (4, 0), (10**8, 1)])
def test_impossible_plans_are_wrong_calls(n_windows, per_shard):
    with pytest.raises(ValueError, match="cannot cut"):
        plan(n_windows, per_shard)
