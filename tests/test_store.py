"""What a run stores: files are whole or absent, and a stage is done only while what it was made from stands."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iapo.errors import UserError
from iapo.store import (
    Manifest,
    content_id,
    count_rows,
    fingerprint,
    read_manifest,
    read_table,
    weights_fingerprint,
    write_json,
    write_table,
    write_text,
)


def table(*values: int) -> pa.Table:
    return pa.table({"x": list(values)})


def test_tables_read_back_and_are_counted(tmp_path):
    write_table(tmp_path / "folder" / "00001.parquet", table(3))
    write_table(tmp_path / "folder" / "00000.parquet", table(1, 2))
    assert read_table(tmp_path / "folder")["x"].to_pylist() == [1, 2, 3]  # in the order of their names
    assert read_table(tmp_path / "folder" / "00001.parquet")["x"].to_pylist() == [3]
    assert (count_rows(tmp_path / "folder"), count_rows(tmp_path / "none")) == (3, 0)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["00000.parquet", "00001.parquet"]


@pytest.mark.parametrize("before", [None, (7, 8)])
def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path, monkeypatch, before):
    path = tmp_path / "shards" / "00000.parquet"
    if before:
        write_table(path, table(*before))

    def half(table, file):
        file.write(b"PAR1 half of a file")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", half)
        with pytest.raises(OSError, match="No space left"):
            write_table(path, table(1))
    assert count_rows(tmp_path / "shards") == len(before or ())
    assert path.exists() == bool(before)
    assert list(path.parent.glob(".*")) == []  # a full disk is not filled further with halves
    write_table(path, table(1))
    assert read_table(path)["x"].to_pylist() == [1]


def test_json_refuses_what_is_not_json_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"kl": 1.0})
    with pytest.raises(ValueError):
        write_json(path, {"kl": float("nan")})
    assert json.loads(path.read_text()) == {"kl": 1.0}


def test_fingerprint_depends_on_names_and_contents_alone(tmp_path):
    for name in ("a", "b"):
        write_text(tmp_path / name / "one.txt", "1")
        write_text(tmp_path / name / "deep" / "two.txt", "2")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a" / "one.txt") == fingerprint(tmp_path / "b" / "one.txt")
    write_text(tmp_path / "b" / "deep" / "two.txt", "3")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    write_text(tmp_path / "b" / "deep" / "two.txt", "2")
    (tmp_path / "b" / "one.txt").rename(tmp_path / "b" / "three.txt")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_content_id_ignores_the_order_of_keys_only():
    assert content_id({"a": 1, "b": 2}) == content_id({"b": 2, "a": 1})
    assert len({content_id(x) for x in ([1, 2], [2, 1], ["1", "2"], {"1": 2}, "", None)}) == 6


def test_states_of_a_stage(tmp_path):
    def stage(rate: float = 1.0, prompts: str = "abc") -> Manifest:
        return Manifest(tmp_path, "train", {"settings": {"train": {"rate": rate}}, "inputs": {"prompts": prompts}})

    assert (stage().state(), read_manifest(tmp_path, "train")) == ("to do", None)
    stage().start()
    assert (stage().state(), stage(2.0).state()) == ("partial", "stale")
    write_text(tmp_path / "adapter" / "weights", "w")
    stage().finish([tmp_path / "adapter"], rows=3)
    assert stage().state() == "done"
    record = read_manifest(tmp_path, "train")
    assert record is not None
    assert (record["rows"], record["outputs"]) == (3, {"adapter": fingerprint(tmp_path / "adapter")})
    assert {"python", "torch", "transformers", "peft", "bitsandbytes"} <= record["versions"].keys()

    assert stage(2.0).differences() == ["train.rate was 1.0, is now 2.0"]
    assert stage(prompts="abd").differences() == ["prompts has changed"]
    with pytest.raises(UserError, match=r"train\.rate was 1\.0, is now 2\.0.*iapo train --restart"):
        stage(2.0).start()
    stage(2.0).discard()
    assert stage(2.0).state() == "to do"


def test_free_settings_and_inputs_of_later_versions_make_nothing_stale(tmp_path):
    def stage(size: int, rate: float = 1.0, **inputs: str) -> Manifest:
        settings = {"train": {"micro_batch_size": size, "rate": rate}}
        identity = {"settings": settings, "inputs": {"prompts": "abc"} | inputs}
        return Manifest(tmp_path, "train", identity, free=["train.micro_batch_size"])

    stage(8).start()
    assert stage(4, template="t").state() == "partial"
    stage(4, template="t").start()
    stage(4, template="t").finish([])
    assert stage(2, template="t").state() == "done"
    assert stage(2, 2.0, template="u").differences() == ["template has changed", "train.rate was 1.0, is now 2.0"]


def test_weights_are_told_apart_by_names_sizes_and_parts(tmp_path):
    same = bytes(2**22)
    for name, content in (("a", same), ("b", same), ("c", same[: 2**21] + b"1" * 2**21), ("d", same + b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    found = [weights_fingerprint(tmp_path / name) for name in "abcd"]
    assert found[0] == found[1] and len(set(found)) == 3
