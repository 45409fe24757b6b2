"""Prompts: every format of a source, what is dropped, and how prompts are held out."""

import gzip
import json

import datasets
import pandas as pd
import pytest

from iapo.config import PromptsConfig
from iapo.errors import UserError
from iapo.prompts import Exchange, choose, parse_dialogue, read_exchanges, to_exchange, unique
from iapo.store import read_table

U, A, S = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


HH = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: Why?\n\nAssistant: Because{}"


@pytest.mark.parametrize(
    "record, prompt, responses, metadata",
    [
        ({"prompt": "Hi"}, turns((U, "Hi")), [], {}),
        ({"question": "2+2?", "answer": "4"}, turns((U, "2+2?")), [], {"answer": "4"}),
        ({"prompt": None, "text": "Hi"}, turns((U, "Hi")), [], {"prompt": None}),
        ({"messages": turns((S, "Be brief"), (U, "Hi"))}, turns((S, "Be brief"), (U, "Hi")), [], {}),
        ({"messages": turns((U, "Hi"), (A, "Yes?"))}, turns((U, "Hi")), ["Yes?"], {}),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
            turns((U, "Hi")),
            ["Yes?"],
            {},
        ),
        ({"prompt": "Hi", "chosen": "Good", "rejected": "Bad"}, turns((U, "Hi")), ["Good", "Bad"], {}),
        ({"prompt": "Hi", "responses": ["a", "b"], "n": 1}, turns((U, "Hi")), ["a", "b"], {"n": 1}),
        (
            {"prompt": turns((U, "Hi")), "chosen": turns((U, "Hi"), (A, "Good")), "rejected": turns((A, "Bad"))},
            turns((U, "Hi")),
            ["Good", "Bad"],
            {},
        ),
        (
            {"chosen": HH.format(" x."), "rejected": HH.format(" y.")},
            turns((U, "Hello"), (A, "Hi."), (U, "Why?")),
            ["Because x.", "Because y."],
            {},
        ),
        ({"prompt": "Human: is this a dialogue?"}, turns((U, "is this a dialogue?")), [], {}),
        ({"prompt": "Say\n\nHuman: x"}, turns((U, "Say\n\nHuman: x")), [], {}),
        ({"prompt": None}, [], [], {}),
        ({"prompt": "Hi", "responses": "yes it is"}, turns((U, "Hi")), ["yes it is"], {}),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": "Yes?"}, turns((U, "Hi")), ["Yes?"], {}),
        ({"prompt": "Hi", "response": ""}, turns((U, "Hi")), [""], {}),
    ],
)
def test_record_to_exchange(record, prompt, responses, metadata):
    exchange = to_exchange(record)
    assert (exchange.prompt, exchange.responses, exchange.metadata) == (prompt, responses, metadata)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\n\nHuman: a\n\nAssistant: b", turns((U, "a"), (A, "b"))),
        ("Human: a", turns((U, "a"))),
        ("\n\nHuman: a\n\nb\n\nAssistant: c\n\nd", turns((U, "a\n\nb"), (A, "c\n\nd"))),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", turns((U, "a\n\nb"), (A, ""))),
    ],
)
def test_dialogue(text, expected):
    assert parse_dialogue(text) == expected


@pytest.mark.parametrize(
    "record, column, words",
    [
        ({"other": "x"}, None, ["other", "prompts.column"]),
        ({"prompt": "x"}, "question", ["question", "prompts.column"]),
        ({"prompt": 5}, None, ["5", "{role: user"]),
        ({"prompt": [{"role": "robot", "content": "x"}]}, None, ["robot", "{role: user"]),
        ({"prompt": "x", "chosen": turns((U, "x"))}, None, ["a response", "ending with the assistant"]),
    ],
)
def test_unreadable_record(record, column, words):
    with pytest.raises(UserError) as caught:
        to_exchange(record, column)
    for word in words:
        assert word in str(caught.value)


RECORDS = [
    {"prompt": "One, with a comma", "level": 1},
    {"prompt": 'Two\nwith "quotes" and a line', "level": 2},
    {"prompt": "Três", "level": 3},
]


def write_source(kind: str, folder) -> str:
    path = folder / f"source.{kind}"
    match kind:
        case "jsonl":
            path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n")
        case "jsonl.gz":
            path.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in RECORDS).encode()))
        case "csv" | "csv.gz":
            pd.DataFrame(RECORDS).to_csv(path, index=False)
        case "parquet":
            pd.DataFrame(RECORDS).to_parquet(path)
        case "saved":
            datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))
        case "saved_dict":
            datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(str(path))
        case "folder":  # as a clone of a hub data set
            path.mkdir()
            (path / "train.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet", "saved", "saved_dict", "folder"])
def test_every_format_reads_the_same(tmp_path, kind):
    exchanges = list(read_exchanges(PromptsConfig(source=write_source(kind, tmp_path))))
    assert [exchange.prompt for exchange in exchanges] == [turns((U, str(r["prompt"]))) for r in RECORDS]
    assert [exchange.metadata for exchange in exchanges] == [{"level": r["level"]} for r in RECORDS]


@pytest.mark.parametrize("kind", ["txt", "txt.gz"])
def test_text_has_a_prompt_a_line(tmp_path, kind):
    text = b"One, two\n\n  \nHuman: three\n"
    (tmp_path / f"p.{kind}").write_bytes(gzip.compress(text) if kind == "txt.gz" else text)
    exchanges = read_exchanges(PromptsConfig(source=str(tmp_path / f"p.{kind}")))
    assert [exchange.prompt for exchange in exchanges] == [turns((U, "One, two")), turns((U, "three"))]


def test_csv_with_a_hole_in_it(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,chosen\nHi,\nHo,x\n")
    exchanges = list(read_exchanges(PromptsConfig(source=str(tmp_path / "p.csv"))))
    assert [exchange.responses for exchange in exchanges] == [[], ["x"]]


def test_csv_cells_are_what_is_written_there(tmp_path):
    """Numbers only in columns where nothing is lost by it, and never for prompts and responses."""
    (tmp_path / "p.csv").write_text("prompt,response,code,level,score\nNone,12,007,1,0.5\n42,NA,8,2,1.25\n,x,,3,2.0\n")
    exchanges = list(read_exchanges(PromptsConfig(source=str(tmp_path / "p.csv"))))
    assert [exchange.prompt[0]["content"] for exchange in exchanges] == ["None", "42", ""]
    assert [exchange.responses for exchange in exchanges] == [["12"], ["NA"], ["x"]]
    assert [exchange.metadata for exchange in exchanges] == [
        {"code": "007", "level": 1, "score": 0.5},
        {"code": "8", "level": 2, "score": 1.25},
        {"code": "", "level": 3, "score": 2.0},
    ]
    named = list(read_exchanges(PromptsConfig(source=str(tmp_path / "p.csv"), column="level")))
    assert [exchange.prompt[0]["content"] for exchange in named] == ["1", "2", "3"]


def test_responses_that_cannot_be_read_matter_only_where_they_are_used(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "completions": [{"model": "m", "text": "b"}]}\n{"prompt": null}\n'
    )
    exchanges = read_exchanges(PromptsConfig(source=str(tmp_path / "p.jsonl")))
    kept, dropped = unique(exchanges)
    assert [(e.prompt, e.responses) for e in kept] == [(turns((U, "a")), [])] and dropped["empty prompts"] == 1
    with pytest.raises(UserError, match="record 1"):
        list(read_exchanges(PromptsConfig(source=str(tmp_path / "p.jsonl"), given_responses=True)))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ("p.jsonl", b'["a"]\n', ["line 1", "expected an object"]),
        ("p.jsonl", b'{"prompt": "a"}\n{"x": 1}\n', ["record 2", "prompts.column"]),
        ("p.jsonl", b'{"prompt": "caf\xe9"}\n', ["p.jsonl", "utf-8"]),
        ("p.parquet", b"not parquet", ["p.parquet"]),
        ("p.csv", b'prompt\n"never closed\n', ["p.csv"]),
        ("p.csv", b"", ["p.csv"]),
        ("p.jsonl.gz", b"not gzip", ["p.jsonl.gz"]),
        ("p.doc", b"x", [".jsonl, .csv, .parquet or .txt"]),
    ],
)
def test_unreadable_file_is_named_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_exchanges(PromptsConfig(source=str(tmp_path / name))))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.txt.gz"])
def test_missing_file(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        list(read_exchanges(PromptsConfig(source=str(tmp_path / name))))


def test_missing_split(tmp_path):
    source = write_source("saved_dict", tmp_path)
    with pytest.raises(UserError, match="split test"):
        list(read_exchanges(PromptsConfig(source=source, split="test")))


def test_duplicates_are_joined_and_empty_prompts_dropped():
    exchanges = [
        Exchange(turns((U, "a")), ["1"], {"first": True}),
        Exchange(turns((U, " \n"))),
        Exchange(turns((U, "b")), ["2"]),
        Exchange(turns((U, "a")), ["1", "3"], {"first": False}),
        Exchange([]),
    ]
    kept, dropped = unique(exchanges)
    assert [(e.prompt[0]["content"], e.responses, e.metadata) for e in kept] == [
        ("a", ["1", "3"], {"first": True}),
        ("b", ["2"], {}),
    ]
    assert dropped == {"duplicate prompts": 1, "empty prompts": 2}


def test_choice_depends_on_content_and_seed_alone():
    exchanges = [Exchange(turns((U, str(number)))) for number in range(50)]
    chosen = choose(exchanges, None, 0)
    assert sorted(e.prompt_id for e in chosen) == sorted(e.prompt_id for e in exchanges)
    assert choose(exchanges[::-1], None, 0) == chosen
    assert choose(exchanges, 7, 0) == chosen[:7]
    assert choose(exchanges, None, 1) != chosen
    left = [e for e in exchanges if e != chosen[3]]
    assert choose(left, None, 0) == [e for e in chosen if e != chosen[3]]  # one prompt fewer moves no other


def test_stage(tmp_path, tiny_run, iapo, caplog):
    source = tmp_path / "p.jsonl"
    records = [{"prompt": f"Q{n}", "chosen": f"yes {n}", "rejected": "no", "level": n} for n in range(10)]
    records += [{"prompt": "Q3", "chosen": "indeed"}, {"prompt": " "}]
    source.write_text("\n".join(json.dumps(record) for record in records))
    path = tiny_run(prompts={"source": str(source), "holdout": 3, "given_responses": True})
    assert iapo("prompts", path).code == 0
    assert "dropped 1 duplicate prompts" in caplog.text and "dropped 1 empty prompts" in caplog.text
    rows = read_table(tmp_path / "run" / "prompts.parquet").to_pylist()
    by_text = {row["prompt"][0]["content"]: row for row in rows}
    assert by_text.keys() == {f"Q{n}" for n in range(10)}
    assert sorted(row["split"] for row in rows) == ["holdout"] * 3 + ["train"] * 7
    assert json.loads(by_text["Q4"]["metadata"]) == {"level": 4}
    given = read_table(tmp_path / "run" / "given.parquet").to_pandas()
    mine = given[given["prompt_id"] == by_text["Q3"]["prompt_id"]]
    assert mine["response"].tolist() == ["yes 3", "no", "indeed"]
    assert not given.duplicated(["prompt_id", "sample_id"]).any()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"holdout": 20}, ["20 distinct prompts", "prompts.holdout"]),
        ({"limit": 5}, ["5 distinct prompts", "prompts.holdout"]),
        ({"given_responses": True}, ["given_responses"]),
        ({"source": "none.jsonl"}, ["none.jsonl", "no such file"]),
    ],
)
def test_stage_refuses(tiny_run, iapo, changes, words):
    outcome = iapo("prompts", tiny_run(prompts=changes))
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
