"""What the log-ratio of each response is fitted to: the log density of its calibrated reward, equation (3)."""

import numpy as np
import pandas as pd

from iapo.closed_form import ClosedForm, solve
from iapo.config import Config, ObjectiveConfig
from iapo.store import read_table


def solve_objective(objective: ObjectiveConfig) -> ClosedForm:
    """The closed form of a configured objective."""
    return solve(
        objective.procedure,
        objective.opponent,
        objective.transform,
        beta=objective.beta,
        target_kl=objective.target_kl,
    )


def target_table(config: Config, form: ClosedForm) -> pd.DataFrame:
    """Every response of a prompt that teaches something, with its target.

    Columns prompt_id, sample_id, split, token_ids, ref_logprob, calibrated_reward, target (nats). Prompts whose
    rewards are all equal are left out.
    """
    key = ["prompt_id", "sample_id"]
    responses = read_table(config.run / "responses").select([*key, "token_ids"]).to_pandas()
    calibrated = read_table(config.run / "calibrated.parquet").to_pandas()
    logprobs = read_table(config.run / "ref_logprobs").to_pandas()
    prompts = read_table(config.run / "prompts.parquet").select(["prompt_id", "split"]).to_pandas()
    frame = calibrated.merge(responses, on=key, validate="one_to_one").merge(logprobs, on=key, validate="one_to_one")
    frame = frame.merge(prompts, on="prompt_id", validate="many_to_one")
    low = frame.groupby("prompt_id")["tie_low"].transform("min")
    all_equal = frame["tie_low"].eq(low).groupby(frame["prompt_id"]).transform("all")
    frame = frame[~all_equal].sort_values(key, ignore_index=True)
    frame["target"] = form.log_mean_density(
        frame["tie_low"].to_numpy(dtype=np.float64), frame["tie_high"].to_numpy(dtype=np.float64)
    )
    return frame[[*key, "split", "token_ids", "ref_logprob", "calibrated_reward", "target"]]
