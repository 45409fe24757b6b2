"""Sampling from a server with the OpenAI completions protocol that returns token ids, such as `vllm serve`.

The server must serve `model.base` itself, quantized as configured: its samples are the reference.
"""

import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from iapo.config import Config
from iapo.engines import Engine, Response
from iapo.errors import StageError, UserError

TIMEOUT = 3600.0
"""Seconds to wait for the responses to one prompt."""
WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Asked for by name, because servers take other defaults from the model's generation config."""


def open_engine(config: Config) -> tuple[Engine, int]:
    """An engine that asks `sample.server`, several prompts at once, and the context length of the model."""
    from transformers import AutoConfig

    from iapo.models import resolve

    name = resolve(config.model.base, "reference")
    context = AutoConfig.from_pretrained(name, revision=config.model.revision).get_text_config().max_position_embeddings
    url = f"{config.sample.server}/completions"

    def draw(prompts: list[list[int]], samples: int, seed: int) -> list[list[Response]]:
        def ask(number: int) -> list[Response]:
            request = {
                "model": config.model.base,
                "prompt": prompts[number],
                "n": samples,
                "max_tokens": config.sample.max_new_tokens,
                "temperature": config.sample.temperature,
                "seed": (seed + number) % 2**31,
                "return_token_ids": True,
            }
            return [_response(choice, url) for choice in _post(url, request | WHOLE_DISTRIBUTION)["choices"]]

        at_once = max(1, config.sample.batch_size // samples)
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(ask, range(len(prompts))))

    return draw, context


def _response(choice: dict[str, Any], url: str) -> Response:
    token_ids = choice.get("token_ids")
    if not token_ids:
        raise UserError(
            f"sample.server {url}: the answer has no token_ids; expected a server that knows return_token_ids, "
            "such as vllm serve 0.10.2 or newer: training needs the sampled tokens, not their text"
        )
    return Response(list(token_ids), "length" if choice["finish_reason"] == "length" else "stop")


def _post(url: str, data: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(data).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())[:200]
        raise StageError(
            f"sample.server {url} answered {error.code}: {said}; run `iapo sample` again to go on"
        ) from error
    except OSError as error:
        raise StageError(f"sample.server {url}: {error}; start it, then run `iapo sample` again to go on") from error
