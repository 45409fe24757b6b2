"""Estimates against models that are really loaded and steps that are really taken."""

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_settings
from peft import get_peft_model_state_dict
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, LlamaForCausalLM

from iapo import objectives
from iapo.config import ModelConfig, RewardConfig, TrainConfig, make_config
from iapo.dry_run import at_full_depth, classifying_pass, sampling_step, scoring_pass, training_pass
from iapo.errors import UserError
from iapo.estimate import CARDS, adapter_parameters, estimate, make_model, weight_bytes, workload
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


def allocated(step):
    """The most bytes that torch allocated on the CPU at a time while `step` ran, beside what there was: exact."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([change for _, change in changes]).max())


def test_weights_take_the_bytes_that_the_quantized_model_takes(wide_model):
    model = load_base(ModelConfig(base=str(wide_model), dtype="bfloat16"))
    stored = model.get_memory_footprint()
    constants = sum(
        tensor.nbytes
        for module in model.modules()
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None
        for tensor in (state.absmax, state.state2.absmax)
    )
    assert weight_bytes(make_model(ModelConfig(base=str(wide_model)))()) == pytest.approx(stored + constants, rel=0.02)


@pytest.mark.parametrize("output_layer", [False, True])
def test_adapter_has_the_parameters_of_the_real_one(wide_model, output_layer):
    train = TrainConfig(lora_rank=4, output_layer=output_layer)
    policy = add_adapter(load_base(ModelConfig(base=str(wide_model), quantization="none")), train)
    parameters = sum(
        tensor.numel() for tensor in get_peft_model_state_dict(policy, save_embedding_layers=False).values()
    )
    assert adapter_parameters(make_model(ModelConfig(base=str(wide_model)))(), train) == parameters


@pytest.mark.parametrize(
    ("prompt", "response", "count", "checkpointing", "quantization", "dtype", "output_layer"),
    [
        (60, 41, 4, False, "none", "float32", False),
        (60, 41, 4, False, "none", "float32", True),
        (60, 41, 4, True, "none", "float32", False),
        (5, 30, 12, False, "none", "float32", False),
        (200, 10, 3, True, "none", "bfloat16", False),
        (60, 41, 4, False, "nf4", "bfloat16", False),
        (60, 41, 4, True, "nf4", "bfloat16", False),
        (60, 41, 4, True, "nf4", "bfloat16", True),
    ],
)
def test_memory_of_a_training_pass_is_what_is_allocated(
    wide_model, prompt, response, count, checkpointing, quantization, dtype, output_layer
):
    config = ModelConfig(base=str(wide_model), quantization=quantization, dtype=dtype)
    train = TrainConfig(lora_rank=4, output_layer=output_layer)
    policy = add_adapter(load_base(config), train)
    batch = make_batch([[5] * prompt] * count, [[6] * response] * count, 0, sharing_of(policy))
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    autocast = dtype == "bfloat16"

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objectives.pointwise(response_logprobs(policy, batch), torch.zeros(count))
        loss.backward()

    step()  # the gradients are there from now on
    shapes = [(prompt, response, count)]
    found = training_pass(make_model(config)(), train, shapes, 10_000, checkpointing, autocast, "cpu")
    assert found.peak == pytest.approx(allocated(step), rel=0.1)


def test_an_output_layer_with_an_adapter_makes_logits_once_more(wide_model):
    """164 tokens, 256 states, 272 logits: one product more, and four of each of the low-rank ones."""
    work = []
    for output_layer in (False, True):
        train = TrainConfig(lora_rank=4, output_layer=output_layer)
        model = make_model(ModelConfig(base=str(wide_model), quantization="none"))()
        counted = training_pass(model, train, [(60, 41, 4)], 10_000, False, False, "cpu")
        work.append(sum(operations * count for (operations, _), count in counted.kernels.items()))
    assert work[1] - work[0] == pytest.approx(2 * 164 * (256 * 272 + 4 * 4 * (256 + 272)), rel=0.02)


def test_memory_of_scoring_and_sampling_is_what_is_allocated(wide_model):
    config = ModelConfig(base=str(wide_model), quantization="none", dtype="float32")
    model = load_base(config)
    batch = make_batch([[5] * 60] * 4, [[6] * 41] * 4, 0, sharing_of(model))
    with torch.no_grad():
        assert scoring_pass(make_model(config)(), [(60, 41, 4)], 10_000, "cpu").peak == pytest.approx(
            allocated(lambda: response_logprobs(model, batch)), rel=0.1
        )

        def draw():
            cache = model(input_ids=torch.full((2, 20), 5), use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(4)
            for _ in range(30):
                logits = model(input_ids=torch.full((8, 1), 6), past_key_values=cache).logits
                torch.multinomial(torch.softmax(logits[:, -1].float(), -1), 1)

        assert sampling_step(make_model(config)(), 20, 49, 2, 4).peak == pytest.approx(allocated(draw), rel=0.1)


def test_depth_is_extended_from_two_shallow_models():
    """Seven layers, of which every second one sees a window only, from three and five."""
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
    settings |= {"num_key_value_heads": 1, "num_hidden_layers": 7, "sliding_window": 16}

    def make():
        kinds = (["sliding_attention", "full_attention"] * 4)[:7]
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **settings, layer_types=kinds))

    for count in (
        lambda model: training_pass(model, TrainConfig(lora_rank=2), [(5, 4, 3)], 100, True, True, "cuda"),
        lambda model: sampling_step(model, 5, 9, 2, 2),
    ):
        whole, extended = count(make()), at_full_depth(make, count)
        assert extended.peaks == pytest.approx(whole.peaks)
        assert extended.kernels == pytest.approx(whole.kernels)


def test_time_is_that_of_work_of_bytes_or_of_starts(wide_model):
    """A forward pass of T tokens: two operations a weight and token, and attention's 4 · hidden a pair that sees."""
    config = ModelConfig(base=str(wide_model), quantization="none", dtype="float32")
    counted = scoring_pass(make_model(config)(), [(50, 31, 1)], 1000, "cpu")
    linear = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    work = 2 * linear * 80 + 2 * 31 * 256 * 272 + 2 * 4 * 256 * (50 * 51 / 2 + 30 * 31 / 2 + 50 * 30)
    assert counted.seconds(1.0, 1e30, 0.0) == pytest.approx(work, rel=1e-3)
    assert counted.seconds(1e30, 1.0, 0.0) > 4 * (linear + 272 * 256)  # every weight is read
    assert counted.seconds(1e30, 1e30, 1.0) == sum(counted.kernels.values())


def test_memory_of_a_reward_model(tiny_reward):
    config = RewardConfig(model=str(tiny_reward))
    assert classifying_pass(make_model(config)(), 30, 8).peak > classifying_pass(make_model(config)(), 30, 4).peak > 0


def test_workload_counts_distinct_prompts_up_to_the_limit(tmp_path, tiny_model):
    settings = tiny_settings(tmp_path / "run", tiny_model)
    assert workload(make_config(settings))[0] == 20
    assert 8 <= workload(make_config(settings))[1] <= workload(make_config(settings))[2]
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
    stages = ["sample", "ref_logprobs", "train", "train: factor", "evaluate"]  # a function needs no GPU to score
    assert list(small) == stages
    assert large["sample"].memory > small["sample"].memory
    assert large["train"].memory == small["train"].memory
    assert large["train"].seconds == pytest.approx(2 * small["train"].seconds)


def test_an_architecture_whose_code_needs_data_is_refused(tmp_path):
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)
    config.save_pretrained(tmp_path / "bloom")
    with pytest.raises(UserError, match="bloom models cannot be estimated"):
        estimate(make_config(tiny_settings(tmp_path / "run", tmp_path / "bloom")), CARDS["rtx-3060"])


def test_card_that_is_not_known(iapo, tiny_run):
    outcome = iapo("estimate", tiny_run(), "--card", "rtx-1")
    assert outcome.code == 2
    assert "--card rtx-1: expected one of rtx-3060" in outcome.err


def test_estimate_prints_every_stage(iapo, tiny_run):
    outcome = iapo("estimate", tiny_run())
    assert outcome.code == 0
    assert all(stage in outcome.out for stage in ("sample", "ref_logprobs", "train", "evaluate", "not measured"))
    assert not torch.cuda.is_initialized()
