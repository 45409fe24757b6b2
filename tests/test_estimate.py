"""Estimates against models that are really loaded."""

import pytest
import torch
from conftest import tiny_config, tiny_settings
from peft import get_peft_model_state_dict
from transformers import LlamaForCausalLM

from iapo.config import ModelConfig, TrainConfig, make_config
from iapo.errors import UserError
from iapo.estimate import CARDS, adapter_bytes, estimate, model_shape, weight_bytes, workload
from iapo.models import load_base
from iapo.train import add_adapter


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A folder of a model wide enough for its linear layers to outweigh its norms."""
    folder = tmp_path_factory.mktemp("wide")
    config = tiny_config(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_parameters_are_counted_from_the_configuration_alone(wide_model):
    shape = model_shape(ModelConfig(base=str(wide_model)))
    model = LlamaForCausalLM.from_pretrained(wide_model)
    assert shape.linear + shape.other == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.hidden, shape.kv_width, shape.vocabulary) == (2, 256, 128, 272)


def test_weights_take_the_bytes_that_the_quantized_model_takes(wide_model):
    shape = model_shape(ModelConfig(base=str(wide_model)))
    model = load_base(ModelConfig(base=str(wide_model), dtype="bfloat16"))
    stored = model.get_memory_footprint()
    constants = sum(
        tensor.nbytes
        for module in model.modules()
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None
        for tensor in (state.absmax, state.state2.absmax)
    )
    assert weight_bytes(shape, "nf4") == pytest.approx(stored + constants, rel=0.02)


def test_adapter_takes_four_float32_a_parameter(wide_model):
    shape = model_shape(ModelConfig(base=str(wide_model)))
    policy = add_adapter(load_base(ModelConfig(base=str(wide_model), quantization="none")), TrainConfig(lora_rank=4))
    parameters = sum(tensor.numel() for tensor in get_peft_model_state_dict(policy).values())
    assert adapter_bytes(shape, 4) == 4 * 4 * parameters


def test_workload_counts_distinct_prompts_up_to_the_limit(tmp_path, tiny_model):
    settings = tiny_settings(tmp_path / "run", tiny_model)
    assert workload(make_config(settings))[0] == 20
    settings["prompts"]["limit"] = 12
    assert workload(make_config(settings))[0] == 12
    settings["prompts"] |= {"source": "someone/dataset", "limit": None}
    with pytest.raises(UserError, match=r"set prompts\.limit"):
        workload(make_config(settings))


def test_memory_and_time_grow_as_they_must(tmp_path, wide_model):
    def needs(**sample):
        settings = tiny_settings(tmp_path / "run", wide_model, sample={"batch_size": 8} | sample)
        return {need.stage: need for need in estimate(make_config(settings), CARDS["rtx-3060"])}

    small, large = needs(), needs(batch_size=64, samples_per_prompt=32)
    assert list(small) == ["sample", "ref_logprobs", "train", "evaluate"]  # a function needs no GPU to score
    assert large["sample"].memory > small["sample"].memory
    assert large["train"].memory == small["train"].memory
    assert large["train"].seconds == pytest.approx(2 * small["train"].seconds)


def test_card_that_is_not_known(iapo, tiny_run):
    outcome = iapo("estimate", tiny_run(), "--card", "rtx-1")
    assert outcome.code == 2
    assert "--card rtx-1: expected one of rtx-3060" in outcome.err


def test_estimate_prints_every_stage(iapo, tiny_run):
    outcome = iapo("estimate", tiny_run())
    assert outcome.code == 0
    assert all(stage in outcome.out for stage in ("sample", "ref_logprobs", "train", "evaluate", "not measured"))
    assert not torch.cuda.is_initialized()
