"""What a run stores: Parquet shards and tables written whole or not at all, and one manifest a stage, written last.

A stage is *done* when its manifest exists and says the same settings and inputs as now; *stale* when it says
others; *partial* when it was started and some of its shards are there; else *to do*.

    run/manifests/STAGE.started.json    identity of the stage (settings, inputs), written first
    run/manifests/STAGE.json            the same with outputs, row counts, versions and notes, written last
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from iapo.errors import UserError

PACKAGES = ("iapo", "torch", "transformers", "peft", "bitsandbytes", "datasets", "pandas", "numpy", "pyarrow")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file under a temporary name, flush it to disk and rename it: whole or not at all."""
    with _written_whole(path) as file:
        pq.write_table(table, file)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk and rename it: whole or not at all."""
    with _written_whole(path) as file:
        file.write(text.encode())


@contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk is not filled further with halves


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all; NaN and infinity are refused, for they are not JSON."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")


def make_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly the columns of `schema`."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def read_table(path: Path) -> pa.Table:
    """One Parquet file, or all of a folder's shards in the order of their names."""
    if path.is_dir():
        return pa.concat_tables(pq.read_table(shard) for shard in sorted(path.glob("*.parquet")))
    return pq.read_table(path)


def count_rows(path: Path) -> int:
    """Rows in a Parquet file or a folder of shards, read from the footers alone."""
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    return sum(pq.read_metadata(shard).num_rows for shard in shards)


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of the names and sizes of a model's files and of 64 parts of each, for whole weights would take minutes.

    Parts lie evenly spaced: trained weights need not differ where a file begins.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(2**14, size // 64)):
                stream.seek(start)
                digest.update(stream.read(2**14))
    return digest.hexdigest()


def content_id(data: Any) -> str:
    """A short identifier of JSON-like content: the same content has the same one everywhere."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


class Manifest:
    """The record of one stage of a run: what it was made from and what it made."""

    def __init__(
        self,
        run: Path,
        stage: str,
        identity: Mapping[str, Any],
        command: str | None = None,
        free: Iterable[str] = (),
    ) -> None:
        """free: settings of the identity, such as `train.micro_batch_size`, that may differ from what is stored."""
        self.run, self.stage, self.command = run, stage, command or stage
        self.free = frozenset(f"settings.{name}" for name in free)
        self.identity = json.loads(json.dumps(identity, default=str))
        self._done = run / "manifests" / f"{stage}.json"
        self._started = run / "manifests" / f"{stage}.started.json"

    def state(self) -> str:
        """`done`, `stale`, `partial` (started and not finished) or `to do`."""
        if self.differences():
            return "stale"
        if self._done.is_file():
            return "done"
        return "partial" if self._started.is_file() else "to do"

    def differences(self) -> list[str]:
        """Why what is stored does not fit what is asked now, a phrase a difference; empty if it fits."""
        path = self._done if self._done.is_file() else self._started
        if not path.is_file():
            return []
        old, new = json.loads(path.read_text())["identity"], self.identity
        known = {name: value for name, value in new["inputs"].items() if name in old["inputs"]}
        return _differences(old, new | {"inputs": known}, self.free)  # an input not known then: of an older version

    def start(self) -> None:
        """Record what the stage is being made from; UserError where it was begun from something else."""
        if differences := self.differences():
            raise UserError(
                f"{self.stage}: what is stored was made otherwise ({'; '.join(differences)}); "
                f"undo the change, choose another `run` folder, or repeat it with `iapo {self.command} --restart`"
            )
        if not self._started.is_file():
            write_json(self._started, {"identity": self.identity})

    def finish(self, outputs: Iterable[Path], **notes: Any) -> None:
        """Record what was made; the presence of this record means that the stage is complete."""
        made = {str(path.relative_to(self.run)): fingerprint(path) for path in outputs}
        record = {"stage": self.stage, "identity": self.identity, "outputs": made, "versions": versions(), **notes}
        write_json(self._done, record)

    def reopen(self) -> None:
        """Take a stage that was done as begun: what it made is about to be removed, or some of it."""
        if self._done.is_file():
            self._done.replace(self._started)

    def discard(self) -> None:
        """Forget the stage was done or begun."""
        self._done.unlink(missing_ok=True)
        self._started.unlink(missing_ok=True)


def read_manifest(run: Path, stage: str) -> dict[str, Any] | None:
    """The record of a finished stage, or None."""
    path = run / "manifests" / f"{stage}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _differences(old: Any, new: Any, free: Set[str], where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), free, f"{where}.{key}" if where else key)
        return found
    if old == new or where in free:
        return []
    if where.startswith("inputs."):
        return [f"{where.removeprefix('inputs.')} has changed"]
    return [f"{where.removeprefix('settings.')} was {_short(old)}, is now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
