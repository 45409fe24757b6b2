"""Sampling with vLLM on this machine's GPU, many times faster than transformers for long responses.

vLLM quantizes with bitsandbytes as the base is configured, so that its samples are the reference's up to rounding.
"""

from iapo.config import Config
from iapo.engines import Engine, Response
from iapo.errors import UserError


def open_engine(config: Config) -> tuple[Engine, int]:
    """An engine over vLLM's own scheduler, and the context length of the model."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(
            "sample.engine: vllm needs the package vllm; install it with pip install 'iapo[vllm]'"
        ) from error

    from iapo.models import resolve

    model = LLM(
        model=resolve(config.model.base, "reference"),
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        quantization="bitsandbytes" if config.model.quantization == "nf4" else None,
        dtype=config.model.dtype,
        generation_config="vllm",
    )

    def draw(prompts: list[list[int]], samples: int, seed: int) -> list[list[Response]]:
        asked = [
            SamplingParams(
                n=samples,
                temperature=config.sample.temperature,
                max_tokens=config.sample.max_new_tokens,
                seed=(seed + number) % 2**31,
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        return [
            [
                Response(list(one.token_ids), "length" if one.finish_reason == "length" else "stop")
                for one in output.outputs
            ]
            for output in outputs
        ]

    return draw, model.llm_engine.model_config.max_model_len
