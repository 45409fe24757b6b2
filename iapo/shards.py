"""Work that is done shard by shard, each shard written as it is done and never done twice.

A shard is a fixed set of prompts with its own seed, so one done again after a crash is the same shard, whether on
this process or on a Ray cluster.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from iapo.progress import progress
from iapo.store import count_rows, write_table

Worker = Callable[[str], pa.Table]
"""Makes the table of the shard of this name."""


def shard_seed(seed: int, name: str) -> int:
    """The seed of one shard: a function of the run's seed and the shard's name alone."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])


def run_shards(
    folder: Path, rows: Mapping[str, int], open_worker: Callable[[], Worker], *, label: str, workers: str
) -> list[Path]:
    """Make every shard that is not in `folder` yet; returns the paths of all.

    rows: shard name -> about how many rows it will have, for the progress bar.
    open_worker: loads what a shard needs (a model); called once a process, and not at all if nothing is missing.
    """
    paths = {name: folder / f"{name}.parquet" for name in rows}
    missing = [name for name, path in paths.items() if not path.is_file()]
    done = sum(count_rows(path) for name, path in paths.items() if name not in missing)
    if missing:
        tables = _on_ray(missing, open_worker) if workers == "ray" else _here(missing, open_worker)
        with progress(label, total=done + sum(rows[name] for name in missing), done=done) as advance:
            for name, table in tables:
                write_table(paths[name], table)
                advance(rows[name])
    return list(paths.values())


def _here(names: list[str], open_worker: Callable[[], Worker]) -> Iterator[tuple[str, pa.Table]]:
    worker = open_worker()
    for name in names:
        yield name, worker(name)


def _on_ray(names: list[str], open_worker: Callable[[], Worker]) -> Iterator[tuple[str, pa.Table]]:
    from iapo.engines.ray import map_shards

    return map_shards(names, open_worker)
