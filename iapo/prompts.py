"""Stage `prompts`: read prompts in whatever form they come, tell them apart by content, hold some out.

Reads   `prompts.source`: JSON lines, CSV, Parquet, plain text (also .gz), a dataset folder or a hub name
Writes  prompts.parquet, one row a prompt
            prompt_id   string                      hash of the conversation (key)
            prompt      list<{role, content}>       ends with a user turn
            split       string                      train or holdout
            metadata    string                      the source's other columns, as JSON
        given.parquet, one row a response that came with the source (only with `prompts.given_responses`)
            prompt_id   string, sample_id int32     (key)
            response    string
"""

import gzip
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from iapo.config import BUNDLED, BUNDLED_FOLDER, Config, PromptsConfig
from iapo.errors import UserError
from iapo.store import Manifest, content_id, make_table, write_table

log = logging.getLogger(__name__)

Message = dict[str, str]

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PROMPTS = pa.schema(
    [("prompt_id", pa.string()), ("prompt", MESSAGES), ("split", pa.string()), ("metadata", pa.string())]
)
GIVEN = pa.schema([("prompt_id", pa.string()), ("sample_id", pa.int32()), ("response", pa.string())])

BUNDLED_PROMPTS = BUNDLED_FOLDER / "prompts.jsonl"
PROMPT_COLUMNS = ("prompt", "messages", "conversations", "conversation", "question", "instruction", "text", "chosen")
RESPONSE_COLUMNS = ("chosen", "rejected", "response", "responses", "completion", "completions")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
GIVEN_FIRST_ID = 1_000_000
"""Sample ids of given responses start here, clear of those of reference samples."""


@dataclass(frozen=True)
class Exchange:
    """A prompt with the responses that came with it and the source's other columns."""

    prompt: list[Message]
    responses: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_id(self) -> str:
        return content_id(self.prompt)


def run(config: Config, manifest: Manifest) -> None:
    """Write prompts.parquet (and given.parquet); the manifest counts duplicates and empty prompts dropped."""
    exchanges, dropped = unique(read_exchanges(config.prompts))
    chosen = choose(exchanges, config.prompts.limit, config.seed)
    if len(chosen) <= config.prompts.holdout:
        raise UserError(
            f"prompts.source {config.prompts.source} has {len(chosen)} distinct prompts and prompts.holdout is "
            f"{config.prompts.holdout}; expected more prompts than held out: lower prompts.holdout or give more"
        )
    for reason, count in dropped.items():
        if count:
            log.warning("prompts: dropped %d %s", count, reason)
    rows = [
        {
            "prompt_id": exchange.prompt_id,
            "prompt": exchange.prompt,
            "split": "holdout" if position < config.prompts.holdout else "train",
            "metadata": json.dumps(exchange.metadata, ensure_ascii=False, default=str),
        }
        for position, exchange in enumerate(chosen)
    ]
    given = [
        {"prompt_id": exchange.prompt_id, "sample_id": GIVEN_FIRST_ID + number, "response": response}
        for exchange in chosen
        for number, response in enumerate(exchange.responses)
    ]
    if config.prompts.given_responses and not given:
        raise UserError(
            f"prompts.given_responses is set and {config.prompts.source} has no responses; expected one of the "
            f"columns {', '.join(RESPONSE_COLUMNS)} or conversations that end with the assistant"
        )
    outputs = [config.run / "prompts.parquet"]
    write_table(outputs[0], make_table(rows, PROMPTS))
    if config.prompts.given_responses:
        outputs.append(config.run / "given.parquet")
        write_table(outputs[1], make_table(given, GIVEN))
    manifest.finish(outputs, rows=len(rows), holdout=config.prompts.holdout, dropped=dropped)


def read_exchanges(config: PromptsConfig) -> Iterator[Exchange]:
    """The source's records as exchanges, in their order. UserError names the record that cannot be read."""
    for number, record in enumerate(_records(config), start=1):
        try:
            yield to_exchange(record, config.column, needed=config.given_responses)
        except UserError as error:
            raise UserError(f"{config.source}, record {number}: {error}") from None


def to_exchange(record: dict[str, Any], column: str | None = None, *, needed: bool = True) -> Exchange:
    """One record as an exchange; the prompt is everything up to the last assistant turn, and empty where it is null.

    needed: whether responses that cannot be read are an error; else the exchange goes without them.
    """
    if column is None:
        there = [name for name in PROMPT_COLUMNS if name in record]
        column = next((name for name in there if record[name] is not None), there[0] if there else None)
    if column is None or column not in record:
        raise UserError(
            f"no prompt among the columns {', '.join(record)}; expected {column or ' or '.join(PROMPT_COLUMNS)}; "
            "name it with prompts.column"
        )
    prompt, last = _split_last_response(_to_messages(record[column]))
    responses = [last] if last else []
    try:
        for name in RESPONSE_COLUMNS:
            if name != column and record.get(name) is not None:
                several = name in ("responses", "completions") and isinstance(record[name], list)
                responses += map(_response_text, record[name] if several else [record[name]])
    except UserError:
        if needed:
            raise
    others = {name: value for name, value in record.items() if name != column and name not in RESPONSE_COLUMNS}
    return Exchange(prompt, responses, others)


def parse_dialogue(text: str) -> list[Message]:
    r"""Split a "\n\nHuman: ...\n\nAssistant: ..." dialogue, the format of the HH data sets, into messages.

    Turns that follow each other with the same role are joined, so that roles alternate as chat templates expect.
    """
    messages: list[Message] = []
    for part in ("\n\n" + text.lstrip("\n")).split("\n\n"):
        for prefix, role in (("Human:", "user"), ("Assistant:", "assistant")):
            if part.startswith(prefix):
                messages.append({"role": role, "content": part.removeprefix(prefix)})
                break
        else:
            if messages:
                messages[-1]["content"] += "\n\n" + part
            elif part.strip():
                raise UserError(f"a dialogue that starts with {part[:30]!r}; expected 'Human:' or 'Assistant:'")
    joined: list[Message] = []
    for message in messages:
        content = message["content"].strip()
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] = f"{joined[-1]['content']}\n\n{content}".strip()
        else:
            joined.append({"role": message["role"], "content": content})
    return joined


def unique(exchanges: Iterable[Exchange]) -> tuple[list[Exchange], dict[str, int]]:
    """Distinct prompts in order of appearance, with the responses of equal prompts together, and what was dropped."""
    found: dict[str, Exchange] = {}
    dropped = {"duplicate prompts": 0, "empty prompts": 0}
    for exchange in exchanges:
        if not exchange.prompt or not exchange.prompt[-1]["content"].strip():
            dropped["empty prompts"] += 1
        elif (known := found.get(exchange.prompt_id)) is not None:
            dropped["duplicate prompts"] += 1
            known.responses.extend(text for text in exchange.responses if text not in known.responses)
        else:
            found[exchange.prompt_id] = exchange
    return list(found.values()), dropped


def choose(exchanges: list[Exchange], limit: int | None, seed: int) -> list[Exchange]:
    """A random order that depends on content and seed alone, cut at `limit`: adding prompts moves no other one."""

    def key(exchange: Exchange) -> bytes:
        return hashlib.sha256(f"{seed}:{exchange.prompt_id}".encode()).digest()

    return sorted(exchanges, key=key)[:limit]


def _to_messages(value: Any) -> list[Message]:
    if value is None:
        return []
    if isinstance(value, str):
        if value.lstrip("\n").startswith("Human:") and "\n\nHuman:" in "\n\n" + value.lstrip("\n"):
            return parse_dialogue(value)
        return [{"role": "user", "content": value}]
    messages = []
    for turn in value if isinstance(value, list) else [value]:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f"a turn {str(turn)[:60]!r}; expected text or {{role: user, content: ...}}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _split_last_response(messages: list[Message]) -> tuple[list[Message], str | None]:
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def _response_text(value: Any) -> str:
    if isinstance(value, str) and not value.lstrip("\n").startswith("Human:"):
        return value
    response = _split_last_response(_to_messages(value))[1]
    if response is None:
        raise UserError(f"a response {str(value)[:60]!r}; expected text or a conversation ending with the assistant")
    return response


def _records(config: PromptsConfig) -> Iterator[dict[str, Any]]:
    path = BUNDLED_PROMPTS if config.source == BUNDLED else Path(config.source)
    if path.is_file():
        yield from _file_records(path, config.column)
    elif any(path.suffix == suffix for suffix in (".jsonl", ".csv", ".parquet", ".txt", ".gz")):
        raise UserError(f"prompts.source {path}: no such file")
    else:
        yield from _dataset(config)


def _file_records(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    kind = (path.suffixes[-2:-1] if path.suffix == ".gz" else [path.suffix])[-1:]
    try:
        match kind:
            case [".txt"]:
                yield from ({"prompt": line.rstrip("\n")} for line in _open(path) if line.strip())
            case [".jsonl"]:
                yield from _json_lines(path)
            case [".csv"]:
                yield from _csv_records(path, column)
            case [".parquet"]:
                import pyarrow.parquet as pq

                yield from pq.read_table(path).to_pylist()
            case _:
                raise UserError(f"prompts.source {path}: expected .jsonl, .csv, .parquet or .txt (also with .gz)")
    except UserError:
        raise
    except (OSError, EOFError, ValueError) as error:  # what gzip, UTF-8, pandas and pyarrow make of a broken file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"prompts.source {path}: cannot be read ({type(error).__name__}: {reason})") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _csv_records(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    """Cells as they are written: a column is read as numbers only where that loses nothing (not 007, None, empty).

    An empty cell is no response.
    """
    import pandas as pd

    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in frame.columns.difference([column, *PROMPT_COLUMNS, *RESPONSE_COLUMNS]):
        numbers = pd.to_numeric(frame[name], errors="coerce")
        if numbers.astype(str).eq(frame[name]).all():
            frame[name] = numbers
    for name in frame.columns.intersection(RESPONSE_COLUMNS):
        frame[name] = frame[name].replace("", None)
    yield from frame.astype(object).to_dict("records")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg}); expected one object a line") from None
            if not isinstance(record, dict):
                raise UserError(f'{path}, line {number}: expected an object such as {{"prompt": ...}}')
            yield record


def _dataset(config: PromptsConfig) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        if (Path(config.source) / "state.json").is_file() or (Path(config.source) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(config.source)
            data = data[config.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(config.source, split=config.split)
    except Exception as error:  # the hub's client has many; each means that there are no prompts to be had
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"prompts.source {config.source}, split {config.split}: not a file, and not loadable as a dataset "
            f"({type(error).__name__}: {reason})"
        ) from error
    yield from data
