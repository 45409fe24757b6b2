"""The configuration of a run: one YAML file, one frozen typed section a stage, every field described once.

Unknown keys fail with the nearest known one, so a misspelt option can never be ignored in silence.
"""

import difflib
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from iapo.errors import UserError

BUNDLED = "bundled"
"""The value of `model.base`, `reward.model` and `prompts.source` that names what ships with the package."""
BUNDLED_FOLDER = Path(__file__).parent / "bundled"


class Section(BaseModel):
    """A part of the configuration: typed, frozen, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    base: str = Field(description="hub name or folder of the base model, or 'bundled'")
    revision: str | None = Field(None, description="branch, tag or commit on the hub; pin it to be repeatable")
    quantization: Literal["nf4", "none"] = Field("nf4", description="NF4 with double quantization, or none")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="what is computed in; auto: bfloat16 on a GPU that has it, else float32"
    )
    chat_template: Path | None = Field(None, description="a Jinja file, for a tokenizer without a chat template")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class PromptsConfig(Section):
    source: str = Field(description=".jsonl, .csv, .parquet or .txt file, dataset folder, hub name, or 'bundled'")
    split: str = Field("train", description="split of a hub data set or dataset folder")
    column: str | None = Field(None, description="column of the prompt; found by its usual names where left out")
    limit: int | None = Field(None, ge=1, description="keep this many distinct prompts, drawn with the seed")
    holdout: int = Field(128, ge=1, description="prompts kept out of training, for evaluation")
    given_responses: bool = Field(False, description="train on the source's own responses too (chosen, rejected, ...)")


class SampleConfig(Section):
    samples_per_prompt: int = Field(32, ge=2, description="K reference responses a prompt; calibrate says its cost")
    max_new_tokens: int = Field(512, ge=1, description="longest response; one that is cut is kept as cut")
    temperature: float = Field(1.0, gt=0, description="of the policy, in sampling and in log-probabilities alike")
    engine: Literal["transformers", "openai", "vllm"] = Field("transformers", description="what samples")
    server: str | None = Field(None, description="base URL of the OpenAI-compatible server (engine: openai)")
    batch_size: int = Field(64, ge=1, description="responses sampled at once")
    shard_size: int = Field(32, ge=1, description="prompts a shard: what is lost at most when interrupted")

    @model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, data: Any) -> Any:
        if isinstance(data, dict) and (cut := {"top_p", "top_k", "min_p"} & set(data)):
            raise ValueError(
                f"{cut.pop()} cuts the reference distribution and equation (3) needs all of it; "
                "leave it out and use temperature"
            )
        return data

    @model_validator(mode="after")
    def _server_where_needed(self) -> Self:
        if (self.engine == "openai") != (self.server is not None):
            raise ValueError("engine: openai goes together with server: http://host:port/v1")
        return self


class RewardConfig(Section):
    model: str | None = Field(None, description="hub name or folder of a sequence classifier, or 'bundled'")
    function: str | None = Field(None, description="module:function(prompts, responses) -> list of floats")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    quantization: Literal["nf4", "none"] = Field("none", description="of the reward model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the reward model")
    batch_size: int = Field(32, ge=1, description="responses scored at once")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the reward model")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.model is None) == (self.function is None):
            raise ValueError("give either model (a sequence classifier) or function (module:function)")
        if self.function is not None and [bool(part) for part in self.function.split(":")] != [True, True]:
            raise ValueError(f"function {self.function!r}: expected module:function, such as my_rewards:helpful")
        return self


class CalibrateConfig(Section):
    pool: bool = Field(False, description="share strength across prompts, so that fewer samples a prompt will do")


class ObjectiveConfig(Section):
    procedure: str = Field("best_of(4)", description="what is done at inference: best_of(4), worst_of(4), sample")
    opponent: str | None = Field(None, description="the procedure given to the reference; by default the same")
    target_kl: float | None = Field(None, gt=0, description="KL budget in nats; fixes beta by equation (2)")
    target_win_rate: float | None = Field(None, gt=0, lt=1, description="in place of target_kl: fixes the KL by (4)")
    beta: float | None = Field(None, gt=0, description="for experts, in place of target_kl")
    transform: str = Field("optimal", description="optimal, first_order, identity, log or exp_tilt(t)")
    loss: Literal["pointwise"] = Field("pointwise", description="how the policy is fitted to the closed form")

    @model_validator(mode="after")
    def _one_knob(self) -> Self:
        if sum(knob is not None for knob in (self.target_kl, self.target_win_rate, self.beta)) != 1:
            raise ValueError("give exactly one of target_kl (nats), target_win_rate and beta")
        return self


class TrainConfig(Section):
    lora_rank: int = Field(16, ge=1, description="rank of the adapter, on every linear layer")
    output_layer: bool = Field(False, description="an adapter on the output layer too; can help worst_of, harm best_of")
    learning_rate: float = Field(3e-4, gt=0, description="peak; larger ones spend the KL on noise")
    epochs: float = Field(1.0, gt=0, description="passes over the training responses")
    batch_size: int = Field(64, ge=1, description="responses an optimizer step, over all devices and accumulation")
    micro_batch_size: int = Field(
        16, ge=1, description="longest responses a forward pass; more where they share prompts"
    )
    gradient_checkpointing: bool = Field(True, description="less memory for a third more time; GPU only")
    evaluations: int = Field(5, ge=1, description="measurements on held-out prompts during training, and checkpoints")


class EvaluateConfig(Section):
    samples_per_prompt: int = Field(32, ge=2, description="responses a held-out prompt for every policy")
    procedures: tuple[str, ...] = Field(
        ("sample", "best_of(4)", "worst_of(4)"), description="measured besides the objective's own"
    )
    adapters: dict[str, Path] = Field(default_factory=dict, description="other adapters to compare: name: folder")
    judge: RewardConfig | None = Field(None, description="a second reward that decides who wins")


class Config(Section):
    run: Path = Field(description="folder of everything this run stores")
    seed: int = Field(0, ge=0, description="of all randomness")
    workers: Literal["local", "ray"] = Field("local", description="where sampling and scoring shards are done")
    model: ModelConfig
    prompts: PromptsConfig
    sample: SampleConfig = SampleConfig()
    reward: RewardConfig
    calibrate: CalibrateConfig = CalibrateConfig()
    objective: ObjectiveConfig
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file and apply overrides such as `train.learning_rate=1e-4`, in order.

    Raises UserError, one line, for a missing file, broken YAML, an unknown key (naming the nearest known one) or a
    value that does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a configuration; `iapo init DIR` writes one to start from")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {_one_line(str(error))}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections such as `model:` and `prompts:`, got {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    return make_config(data, str(path))


def make_config(data: dict[str, Any], origin: str = "configuration") -> Config:
    """Validate a configuration given as nested dicts; UserError in one line, naming `origin`, if it does not fit."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_describe(problem) for problem in error.errors())) from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise UserError(f"--set {override}: expected section.key=value, such as train.learning_rate=1e-4")
    *sections, name = key.strip().split(".")
    node = data
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {section} is a value, not a section")
    try:
        node[name] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not readable as YAML: {_one_line(str(error))}") from error


def _describe(problem: Any) -> str:
    """One pydantic problem in words; YAML 1.1 reads 1e-4 as text, which pydantic turns into the number."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}, got {problem['input']!r}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        field = model.model_fields[part]
        model = field.annotation if hasattr(field.annotation, "model_fields") else RewardConfig
    return list(model.model_fields)


def _one_line(text: str) -> str:
    return " ".join(text.split())
