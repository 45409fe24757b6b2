"""Loading models and tokenizers: the quantized base, adapters, reward models. The only place that knows devices."""

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from iapo.config import BUNDLED, BUNDLED_FOLDER, ModelConfig, RewardConfig
from iapo.errors import UserError

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# docs/pipeline.md says what PEFT would, how such an adapter is merged.
warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer is part")


def device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(name: str) -> torch.dtype:
    """What a dtype of the configuration means on this machine; `auto` is bfloat16 on a GPU that has it."""
    if name != "auto":
        return getattr(torch, name)
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_base(config: ModelConfig) -> Any:
    """The base model, quantized as configured, frozen, in evaluation mode, on this process's device."""
    arguments = _arguments(config.quantization, config.dtype, config.revision, config.trust_remote_code)
    model = _load(AutoModelForCausalLM, resolve(config.base, "reference"), "model.base", **arguments)
    return _keep_weights(model).requires_grad_(False).eval()


def load_policy(config: ModelConfig, adapter: Path | None) -> Any:
    """The base with a LoRA adapter on it; the base alone where adapter is None."""
    base = load_base(config)
    if adapter is None:
        return base
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter_config.json there; expected the folder of a PEFT adapter")
    return PeftModel.from_pretrained(base, adapter).eval()


def load_tokenizer(config: ModelConfig) -> Any:
    """The base's tokenizer; its padding token is set (padding is always masked) and its chat template if configured."""
    name = resolve(config.base, "reference")
    tokenizer = _load(
        AutoTokenizer, name, "model.base", revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model.base {name}: its tokenizer has neither a padding nor an end token; expected one")
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        if not config.chat_template.is_file():
            raise UserError(f"model.chat_template {config.chat_template}: no such file; expected a Jinja template")
        tokenizer.chat_template = config.chat_template.read_text(encoding="utf-8")
    return tokenizer


def load_reward(config: RewardConfig) -> tuple[Any, Any]:
    """A sequence classifier with one output, in evaluation mode, and its own tokenizer."""
    assert config.model is not None
    name = resolve(config.model, "reward")
    trust = {"trust_remote_code": config.trust_remote_code}
    arguments = _arguments(config.quantization, config.dtype, config.revision, config.trust_remote_code)
    model = _load(AutoModelForSequenceClassification, name, "reward.model", **arguments).requires_grad_(False).eval()
    if model.config.num_labels != 1:
        raise UserError(f"reward.model {name} has {model.config.num_labels} outputs; expected a reward model with one")
    tokenizer = _load(AutoTokenizer, name, "reward.model", revision=config.revision, **trust)
    return _unrounded(model), tokenizer


def _unrounded(model: Any) -> Any:
    """The last product in float32 where the rest is 16 bits: rewards rounded to 8 bits tie (docs/log.md)."""
    head = getattr(model, "score", None)
    if type(head) is torch.nn.Linear:
        head.float().register_forward_pre_hook(lambda module, inputs: tuple(one.float() for one in inputs))
    return model


def prompt_token_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt, ready for the response's first token.

    Without a chat template one user message is taken as plain text to be continued; a longer conversation is refused.
    """
    if tokenizer.chat_template is not None:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    elif len(messages) == 1:
        ids = tokenizer(messages[0]["content"])["input_ids"]
    else:
        raise UserError(
            f"the tokenizer has no chat template and a prompt has {len(messages)} turns; "
            "expected one: set model.chat_template to a Jinja file, or give prompts of one turn"
        )
    if not ids:
        raise UserError("a prompt has no tokens; expected some text")
    return list(ids)


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a response: those of the generation config and the tokenizer's own."""
    ends = model.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise UserError("the model and its tokenizer name no end-of-text token; expected eos_token in the tokenizer")
    return frozenset(found)


def context_length(model: Any) -> int:
    """The longest prompt and response together, in tokens."""
    return model.config.get_text_config().max_position_embeddings


def model_revision(model: Any) -> str:
    """Commit of the hub that the weights came from, or the folder's name where they are local."""
    return getattr(model.config, "_commit_hash", None) or Path(model.config._name_or_path).name


def release() -> None:
    """Give the memory of dropped models back to the GPU, for one model is in memory at a time.

    What transformers.Trainer tells bitsandbytes of a model's embeddings, to train them in 32 bits, keeps them in memory
    for good (Llama-3-8B: 1 GB a training): it is forgotten.
    """
    gc.collect()
    if torch.cuda.is_available():
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().module_weight_config_triple.clear()
        torch.cuda.empty_cache()


def resolve(name: str, part: str) -> str:
    """The folder of a bundled model, or the name as it is."""
    return str(BUNDLED_FOLDER / part) if name == BUNDLED else name


def _arguments(quantization: str, dtype: str, revision: str | None, trust: bool) -> dict[str, Any]:
    compute = compute_dtype(dtype)
    arguments: dict[str, Any] = {
        "dtype": compute,
        "revision": revision,
        "trust_remote_code": trust,
        "use_safetensors": True,
        "device_map": {"": device()},
    }
    if quantization == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    return arguments


def _keep_weights(model: Any) -> Any:
    """Keep 4-bit weights what they are in training and evaluation alike.

    On a CPU with AVX512-BF16 bitsandbytes repacks them at the first evaluation and back in training, rounding their
    scales to bfloat16 each time: the reference would drift while the policy is trained and be another one elsewhere.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _load(kind: Any, name: str, key: str, **arguments: Any) -> Any:
    try:
        return kind.from_pretrained(name, **arguments)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"{key} {name} does not fit the GPU's memory; try quantization: nf4 or a smaller one"
        ) from error
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{key} {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
