"""What the log-ratio of each response is fitted to: the log density of its calibrated reward, equation (3)."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from iapo.atoms import atom_log_density
from iapo.closed_form import ClosedForm, solve
from iapo.config import Config, ObjectiveConfig
from iapo.prompts import GIVEN_FIRST_ID
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
    frame["target"] = log_density_targets(frame, form)
    return frame[[*key, "split", "token_ids", "ref_logprob", "calibrated_reward", "target"]]


def log_density_targets(frame: pd.DataFrame, form: ClosedForm) -> npt.NDArray[np.float64]:
    """log f of every row, in nats, from columns prompt_id, sample_id, tie_low, tie_high.

    A rank without ties stands for an interval of quantiles: the log of the mean of f over it. Where reference rewards
    of a prompt tie, its reward levels are atoms and equation (8) is solved for them. Either way the mean of f over the
    K reference samples of a prompt is 1.
    """
    interval = ["tie_low", "tie_high"]
    values = form.log_mean_density(*frame[interval].to_numpy(dtype=np.float64).T)
    reference = frame[frame["sample_id"] < GIVEN_FIRST_ID]
    atoms = reference.drop_duplicates(["prompt_id", *interval]).sort_values(["prompt_id", "tie_low"])
    tied = atoms.groupby("prompt_id").size() < reference.groupby("prompt_id").size()
    atoms = atoms[atoms["prompt_id"].isin(tied.index[tied])]
    if atoms.empty:
        return values
    atoms = atoms.assign(mass=atoms["tie_high"] - atoms["tie_low"], level=atoms.groupby("prompt_id").cumcount())
    masses = atoms.pivot(index="prompt_id", columns="level", values="mass").fillna(0.0)
    solved = pd.DataFrame(atom_log_density(masses.to_numpy(), form), masses.index, masses.columns)
    found = frame.merge(atoms[["prompt_id", *interval, "level"]], on=["prompt_id", *interval], how="left")
    at_atom = found["level"].notna().to_numpy()
    at = found[at_atom]
    values[at_atom] = solved.stack().loc[list(zip(at["prompt_id"], at["level"].astype(int), strict=True))].to_numpy()
    return values
