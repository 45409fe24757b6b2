"""Estimates against models that are really loaded."""

import pytest
import torch
from conftest import tiny_config, tiny_settings
from peft import get_peft_model_state_dict
from transformers import LlamaForCausalLM

from iapo import packed_trainer, token_logprobs
from iapo.config import ModelConfig, TrainConfig, make_config
from iapo.errors import UserError
from iapo.estimate import (
    CARDS,
    LOGITS,
    TOGETHER,
    activation_bytes,
    adapter_bytes,
    estimate,
    model_shape,
    weight_bytes,
    workload,
)
from iapo.logprobs import make_batch, response_logprobs, sharing_of
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_a_step_keeps(wide_model, checkpointing):
    """Against what autograd saves, storage by storage, in float32; weights are not counted."""
    policy = add_adapter(load_base(ModelConfig(base=str(wide_model), quantization="none")), TrainConfig(lora_rank=4))
    batch = make_batch([[5] * 60] * 4, [[6] * 41] * 4, 0, sharing_of(policy))
    if checkpointing:
        policy.train().gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_logprobs(policy, batch)
    found = sum(size for size, _ in saved.values())
    shape, tokens = model_shape(ModelConfig(base=str(wide_model))), batch.input_ids.shape[1]
    expected = activation_bytes(shape, tokens, 4, checkpointing, 4)
    if checkpointing:  # the layer that is done again comes later
        expected -= activation_bytes(shape, tokens, 4, False, 4) / shape.layers
    beside = 4 * (4 * 41 + tokens) * shape.hidden  # gradients by hidden state, and what enters the last norm
    assert found == pytest.approx(expected + beside, rel=0.1)


def test_constants_are_those_of_the_trainer():
    """estimate imports no torch, so it has its own."""
    assert 4 * token_logprobs.CHUNK["cuda"] == LOGITS and packed_trainer.TOGETHER == TOGETHER


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
