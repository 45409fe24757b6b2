"""Configuration: what is read, overridden and refused, and in which words."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from iapo.config import Config, load_config, make_config
from iapo.errors import UserError
from iapo.start import demo_config, write_config

MINIMAL = """
run: runs/x
model: {base: some/model}
prompts: {source: prompts.jsonl}
reward: {function: "my_rewards:helpful"}
objective: {procedure: best_of(8), target_kl: 2.0}
"""


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "iapo.yaml"
    file.write_text(MINIMAL)
    return file


def test_minimal_file_has_defaults_for_the_rest(path):
    config = load_config(path)
    assert (config.run, config.model.base, config.model.quantization) == (Path("runs/x"), "some/model", "nf4")
    assert (config.objective.procedure, config.objective.target_kl, config.objective.beta) == ("best_of(8)", 2.0, None)


@pytest.mark.parametrize(
    "override, section, key, value",
    [
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),  # YAML 1.1 takes 1e-4 for text
        ("train.learning_rate=0.002", "train", "learning_rate", 0.002),
        ("prompts.limit=17", "prompts", "limit", 17),
        ("prompts.given_responses=true", "prompts", "given_responses", True),
        ("objective.procedure=worst_of(4)", "objective", "procedure", "worst_of(4)"),
        ("evaluate.procedures=[sample, best_of(2)]", "evaluate", "procedures", ("sample", "best_of(2)")),
        ("evaluate.adapters.old=a/b", "evaluate", "adapters", {"old": Path("a/b")}),
    ],
)
def test_override(path, override, section, key, value):
    assert getattr(getattr(load_config(path, (override,)), section), key) == value


def test_later_override_wins(path):
    assert load_config(path, ("seed=1", "seed=2")).seed == 2


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.learning_rat=1"], ["unknown key train.learning_rat", "did you mean learning_rate?"]),
        (["trian.epochs=1"], ["unknown key trian", "did you mean train?"]),
        (["reward.modle=x"], ["unknown key reward.modle", "model?"]),
        (["evaluate.judge.functon='a:b'"], ["unknown key evaluate.judge.functon", "did you mean function?"]),
        (["objective.zzzz=1"], ["unknown key objective.zzzz", "known: procedure, opponent"]),
        (["sample.top_p=0.9"], ["top_p", "leave it out", "temperature"]),
        (["sample.top_k=50"], ["top_k", "equation (3)"]),
        (["objective.beta=0.1"], ["exactly one of target_kl", "beta"]),
        (["objective.target_win_rate=0.75"], ["exactly one of target_kl", "target_win_rate"]),
        (["objective.target_kl=null"], ["exactly one of target_kl", "beta"]),
        (["objective.target_win_rate=1"], ["objective.target_win_rate", "less than 1"]),
        (["objective.target_kl=0"], ["objective.target_kl", "greater than 0"]),
        (["objective.target_kl=.nan"], ["objective.target_kl", "finite"]),
        (["reward.model=x"], ["either model", "function"]),
        (["reward.function=null"], ["either model", "function"]),
        (["reward.function=helpful"], ["module:function", "helpful"]),
        (["reward.function=':helpful'"], ["module:function", "helpful"]),
        (["train.epochs=many"], ["train.epochs", "number", "'many'"]),
        (["sample.samples_per_prompt=1"], ["sample.samples_per_prompt", "2"]),
        (["sample.engine=openai"], ["engine: openai", "server"]),
        (["sample.server='http://x/v1'"], ["engine: openai", "server"]),
        (["train.learning_rate"], ["section.key=value"]),
        (["run.x=1"], ["run is a value"]),
        (["seed=[1"], ["--set seed=[1", "YAML"]),
    ],
)
def test_refused_in_one_line(path, overrides, words):
    with pytest.raises(UserError) as caught:
        load_config(path, tuple(overrides))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("run: [", ["YAML"]),
        ("- a\n- b\n", ["sections", "list"]),
        ("", ["sections"]),
        ("run: x", ["model is missing", "prompts is missing", "objective is missing"]),
        (MINIMAL.replace("run: runs/x", ""), ["run is missing"]),
        (MINIMAL.replace("{base: some/model}", "{}"), ["model.base is missing"]),
        (MINIMAL.replace("{base: some/model}", ""), ["model"]),
        ("run: !!python/object/apply:os.getcwd []\n", ["YAML"]),
    ],
)
def test_bad_file_is_refused_in_one_line(path, text, words):
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message


def test_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="iapo init"):
        load_config(tmp_path / "iapo.yaml")


def test_a_stored_configuration_reads_back(path):
    config = load_config(path, ("evaluate.adapters.old=a/b", "train.epochs=2"))
    assert make_config(yaml.safe_load(config.model_dump_json())) == config


def test_every_key_is_described():
    def fields(model: type[BaseModel]):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from fields(field.annotation)
            else:
                yield f"{model.__name__}.{name}", field.description

    assert [name for name, description in fields(Config) if not description] == []


def test_shipped_templates_are_valid(tmp_path):
    assert demo_config(tmp_path).run == tmp_path
    assert load_config(write_config(tmp_path / "new")).objective.procedure == "best_of(8)"
    with pytest.raises(UserError, match="there already"):
        write_config(tmp_path / "new")
