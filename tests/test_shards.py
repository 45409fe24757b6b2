"""Shards: each is done once, kept when the work stops, and has a seed of its own."""

import pyarrow as pa
import pytest

from iapo.shards import run_shards, shard_seed
from iapo.store import read_table

ROWS = {"00000": 2, "00001": 2, "00002": 2}


def work(done: list[str], *, stop_at: str | None = None):
    """open_worker of a worker that notes what it did and is interrupted at a shard."""

    def open_worker():
        done.append("open")

        def make(name: str) -> pa.Table:
            if name == stop_at:
                raise KeyboardInterrupt
            done.append(name)
            return pa.table({"name": [name] * 2})

        return make

    return open_worker


def test_interrupted_work_goes_on_where_it_stopped(tmp_path):
    first, second, third = [], [], []
    with pytest.raises(KeyboardInterrupt):
        run_shards(tmp_path, ROWS, work(first, stop_at="00001"), label="", workers="local")
    assert first == ["open", "00000"] and [path.name for path in tmp_path.iterdir()] == ["00000.parquet"]
    paths = run_shards(tmp_path, ROWS, work(second), label="", workers="local")
    assert second == ["open", "00001", "00002"]
    assert paths == [tmp_path / f"{name}.parquet" for name in ROWS]
    assert read_table(tmp_path)["name"].to_pylist() == [name for name in ROWS for _ in range(2)]
    run_shards(tmp_path, ROWS, work(third), label="", workers="local")
    assert third == []  # nothing missing: no model is loaded


def test_seeds_differ_and_do_not_change():
    seeds = {shard_seed(seed, f"{shard:05d}") for seed in range(20) for shard in range(50)}
    assert len(seeds) == 1000 and max(seeds) < 2**63
    assert shard_seed(0, "00000") == int("500f3fe343c8a5", 16)  # printf '0:00000' | sha256sum
