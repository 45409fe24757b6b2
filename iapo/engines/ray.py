"""Shards as tasks of a Ray cluster: the same workers as on this machine, one for each GPU (or each core)."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from iapo.errors import UserError

Worker = Callable[[str], pa.Table]


def map_shards(names: list[str], open_worker: Callable[[], Worker]) -> Iterator[tuple[str, pa.Table]]:
    """Make the shards of these names on the cluster that RAY_ADDRESS names, or one started here; yields as they come.

    Each Ray worker process opens its model once and makes shards one after another.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("workers: ray needs the package ray; install it with pip install 'iapo[ray]'") from error
    from ray.util import ActorPool

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    actors = min(len(names), gpus or int(resources.get("CPU", 1)))
    remote: Any = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1)(_ShardMaker)
    pool = ActorPool([remote.remote(open_worker) for _ in range(actors)])
    yield from pool.map_unordered(lambda actor, name: actor.make.remote(name), names)


class _ShardMaker:
    """Lives in a Ray process and holds the opened worker."""

    def __init__(self, open_worker: Callable[[], Worker]) -> None:
        self.worker = open_worker()

    def make(self, name: str) -> tuple[str, pa.Table]:
        return name, self.worker(name)
