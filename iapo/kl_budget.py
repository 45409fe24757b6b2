"""The last part of `train`: one scalar on the adapter, so that the policy spends the KL that was asked for.

A fit to finite samples has less KL than its targets, since what it cannot predict it leaves out (and more, where steps
were too large). Δ grows with the adapter's weights, so the KL does, about as their square. The factor is found on the
policy's own samples for held-out prompts: by KL, not by reward, so that evaluation on them stays honest.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from iapo.calibrate import held_out_prompts
from iapo.config import Config
from iapo.engines.transformers import configured_engine
from iapo.estimators import mean_over_prompts
from iapo.logprobs import divergences_of
from iapo.models import context_length, load_policy, load_tokenizer, prompt_token_ids
from iapo.sample import fits
from iapo.shards import shard_seed

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

RESPONSES = 1536
"""Sampled for each estimate of the KL: its standard error is then 1 to 3 % at half a nat (measured: docs/log.md)."""
TOLERANCE = 0.03
ROUNDS = 6
FAR = 2.0
"""Times the target: an adapter that spends more before it is scaled has not learned its targets alone."""
SMALLEST, LARGEST = 1 / 16, 8.0
"""Bounds of the factor: outside of them the adapter has learned next to nothing, or mostly noise."""


@dataclass(frozen=True)
class Scale:
    """The factor on the adapter's weights, the KL it gives and its standard error (nats), and the KL without it."""

    factor: float
    kl: float
    kl_se: float
    kl_before: float


def find_factor(kl_of: Callable[[float], tuple[float, float]], target_kl: float) -> Scale:
    """The factor whose KL is the target, within TOLERANCE, by secants of log KL in log factor.

    kl_of: KL and its standard error at a factor; grows with it, about as its square. Where it does not, secants lead
    astray: then the interval is halved in which it first passes the target.
    """
    tried = {1.0: kl_of(1.0)}
    for _ in range(ROUNDS):
        factor, (kl, _se) = min(tried.items(), key=lambda one: abs(np.log(max(one[1][0], 1e-9) / target_kl)))
        if abs(kl / target_kl - 1) <= TOLERANCE:
            break
        slope = 2.0
        if len(tried) > 1:
            points = sorted((abs(np.log(other / factor)), other) for other in tried if other != factor)
            other = points[0][1]
            rise = np.log(max(kl, 1e-9) / max(tried[other][0], 1e-9)) / np.log(factor / other)
            slope = float(np.clip(rise, 1.0, 4.0))
        guess = float(np.clip(factor * (target_kl / max(kl, 1e-9)) ** (1 / slope), SMALLEST, LARGEST))
        above = [other for other in tried if tried[other][0] > target_kl]
        high = min(above, default=LARGEST)
        low = max((other for other in tried if other not in above and other <= high), default=SMALLEST)
        if guess in tried or not low <= guess <= high:
            guess = float(np.sqrt(low * high))
        if guess in tried:
            break
        tried[guess] = kl_of(guess)
    factor, (kl, se) = min(tried.items(), key=lambda one: abs(np.log(max(one[1][0], 1e-9) / target_kl)))
    return Scale(factor, kl, se, tried[1.0][0])


def sampled_kls(config: Config, policy: Any) -> Callable[[], Floats]:
    """A function that samples the policy as it is and returns the KL of each held-out prompt, [prompts], in nats.

    Always with the same seed, so that two factors differ by little else.
    """
    tokenizer = load_tokenizer(config.model)
    tokens = [prompt_token_ids(tokenizer, row["prompt"]) for row in held_out_prompts(config)]
    tokens = [ids for ids in tokens if fits(ids, config, context_length(policy))]
    tokens = [tokens[int(i)] for i in np.linspace(0, len(tokens) - 1, min(len(tokens), RESPONSES // 2))]
    samples = -(-RESPONSES // len(tokens))
    prompts = [ids for ids in tokens for _ in range(samples)]
    engine = configured_engine(policy, tokenizer, config.sample)

    def sampled() -> Floats:
        drawn = engine(tokens, samples, shard_seed(config.seed, "kl_budget"))
        found = divergences_of(
            policy,
            prompts,
            [response.token_ids for group in drawn for response in group],
            pad_id=tokenizer.pad_token_id,
            batch_size=config.train.micro_batch_size,
            temperature=config.sample.temperature,
        )
        return np.reshape([one.kl for one in found], (len(tokens), samples)).mean(axis=1)

    return sampled


def meet(
    config: Config,
    adapter: Path,
    target_kl: float,
    measure: Callable[[Config, Any], Callable[[], Floats]] = sampled_kls,
) -> dict[str, float]:
    """Scale a stored adapter so that its policy has the target KL, in nats; returns a Scale as a dict.

    measure: of a policy, what gives its KL on each prompt whenever it is called, as it is then. Warns where no factor
    in [SMALLEST, LARGEST] has the target KL, and where it spent far more than the target before.
    """
    policy = load_policy(config.model, adapter)
    original = {name: weight.clone() for name, weight in policy.named_parameters() if "lora_B" in name}

    def set_factor(factor: float) -> None:
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if name in original:
                    weight.copy_(original[name] * factor)

    kls = measure(config, policy)

    def kl_of(factor: float) -> tuple[float, float]:
        set_factor(factor)
        kl = mean_over_prompts(kls())
        log.debug("adapter times %.3f: KL %.4f ± %.4f", factor, kl.value, kl.se)
        return kl.value, kl.se

    scale = find_factor(kl_of, target_kl)
    set_factor(scale.factor)
    policy.save_pretrained(adapter, save_embedding_layers=False)
    if abs(scale.kl / target_kl - 1) > 0.1:
        log.warning(
            "train: the adapter times %.3g spends %.3g nats where %.3g were asked for; %s, then `iapo train --restart`",
            *(scale.factor, scale.kl, target_kl),
            "lower train.learning_rate" if scale.kl > target_kl else "give more responses, or train longer",
        )
    if scale.kl_before > FAR * target_kl:
        log.warning(
            "train: the adapter spent %.3g nats before it was scaled, where %.3g were asked for: on noise, or on "
            "responses that the reference never gives; lower train.learning_rate or give more responses, then "
            "`iapo train --restart`",
            *(scale.kl_before, target_kl),
        )
    return asdict(scale)
