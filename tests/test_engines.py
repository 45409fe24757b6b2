"""Engines besides transformers: a real server over HTTP, and Ray where it is installed."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from iapo.config import Config, make_config
from iapo.engines.transformers import sample_batch
from iapo.errors import StageError, UserError
from iapo.pipeline import run_stage
from iapo.store import read_table


class Completions(BaseHTTPRequestHandler):
    """The completions protocol, as far as sampling needs it, over a model of this process."""

    model = None
    with_token_ids = True

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and asked["top_p"] == 1.0 and asked["top_k"] == -1
        generator = torch.Generator().manual_seed(asked["seed"])
        [drawn] = sample_batch(
            self.model, [asked["prompt"]], asked["n"], frozenset([1]), 0, asked["max_tokens"], 1.0, generator
        )
        choices = [{"text": "", "finish_reason": r.finish_reason, "token_ids": r.token_ids} for r in drawn]
        if not self.with_token_ids:
            choices = [{"text": "hello", "finish_reason": "stop"}]
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(tiny_model: Path) -> Iterator[str]:
    Completions.model = AutoModelForCausalLM.from_pretrained(tiny_model)
    Completions.with_token_ids = True
    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/v1"
        served.shutdown()


def configure(folder: Path, model: Path, **sections) -> Config:
    source = folder / "prompts.txt"
    source.write_text("\n".join(f"question {number}" for number in range(6)))
    sample = {"samples_per_prompt": 4, "max_new_tokens": 8, "shard_size": 2}
    return make_config(
        {
            "run": folder / "run",
            "model": {"base": str(model), "quantization": "none"},
            "prompts": {"source": str(source), "holdout": 2},
            "sample": sample | sections.pop("sample", {}),
            "reward": {"function": "tiny_rewards:average_byte"},
            "objective": {"target_kl": 0.1},
            **sections,
        }
    )


def test_server_gives_every_sample_as_token_ids(server, tiny_model, tmp_path):
    config = configure(tmp_path, tiny_model, sample={"engine": "openai", "server": server})
    run_stage("prompts", config)
    run_stage("sample", config)
    rows = read_table(config.run / "responses").to_pylist()
    assert len(rows) == 6 * 4
    for row in rows:
        assert 1 <= len(row["token_ids"]) <= 8
        assert (row["token_ids"][-1] == 1) == (row["finish_reason"] == "stop")
    assert len({tuple(row["token_ids"]) for row in rows}) > 12  # seeds differ from prompt to prompt


def test_server_without_token_ids_is_refused(server, tiny_model, tmp_path):
    Completions.with_token_ids = False
    config = configure(tmp_path, tiny_model, sample={"engine": "openai", "server": server})
    run_stage("prompts", config)
    with pytest.raises(UserError, match="no token_ids; expected a server that knows return_token_ids"):
        run_stage("sample", config)


def test_server_that_is_not_there(tiny_model, tmp_path):
    config = configure(tmp_path, tiny_model, sample={"engine": "openai", "server": "http://127.0.0.1:9/v1"})
    run_stage("prompts", config)
    with pytest.raises(StageError, match="start it, then run `iapo sample` again"):
        run_stage("sample", config)


def test_ray_makes_the_same_shards(tiny_model, tmp_path):
    pytest.importorskip("ray", reason="ray is an extra")
    shards = {}
    for workers in ("local", "ray"):
        (tmp_path / workers).mkdir()
        config = configure(tmp_path / workers, tiny_model, workers=workers)
        run_stage("prompts", config)
        run_stage("sample", config)
        shards[workers] = [path.read_bytes() for path in sorted((config.run / "responses").glob("*.parquet"))]
    assert len(shards["local"]) == 3
    assert shards["ray"] == shards["local"]
