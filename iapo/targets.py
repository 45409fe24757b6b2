"""What the log-ratio of each response is fitted to: the log density of its calibrated reward, equation (3)."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from iapo.atoms import atom_log_density, mostly_tied
from iapo.closed_form import ClosedForm, solve
from iapo.config import Config, ObjectiveConfig
from iapo.few_samples import interval_targets
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
        target_win_rate=objective.target_win_rate,
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
    """log f of every row, in nats, from columns prompt_id, sample_id, tie_low, tie_high, samples.

    A rank, which is an interval of quantiles, has the target that `few_samples.rank_targets` gives it, a tie the mean
    of its ranks. Where most reference samples of a prompt tie, its reward levels are atoms and equation (8) is solved
    for them.
    """
    low, high = (frame[name].to_numpy(np.float64) for name in ("tie_low", "tie_high"))
    samples = frame["samples"].to_numpy(np.int64)
    values = np.empty(len(frame))
    for count in np.unique(samples):
        rows = samples == count
        values[rows] = interval_targets(form, low[rows], high[rows], int(count))

    prompt = pd.factorize(frame["prompt_id"])[0]
    given = frame["sample_id"].to_numpy() >= GIVEN_FIRST_ID
    below = np.rint(low * samples).astype(np.int64)  # tells the levels of a prompt apart
    width = np.rint((high - low) * samples).astype(np.int64)
    key = prompt * (samples.max(initial=0) + 1) + below
    atoms, sizes = np.unique(key[~given], return_counts=True)
    owner = atoms // (samples.max(initial=0) + 1)
    discrete = mostly_tied(prompt[~given], width[~given] > 1)
    atoms, sizes, owner = (part[discrete[owner]] for part in (atoms, sizes, owner))
    if not len(atoms):
        return values
    row = np.cumsum(np.diff(owner, prepend=owner[0]) > 0)
    level = np.arange(len(row)) - np.searchsorted(row, row)
    masses = np.zeros((row[-1] + 1, level.max() + 1))
    masses[row, level] = sizes
    solved = atom_log_density(masses, form)[row, level]
    found = np.minimum(np.searchsorted(atoms, key), len(atoms) - 1)
    at_atom = (atoms[found] == key) & (~given | (width > 1))
    values[at_atom] = solved[found[at_atom]]
    between = discrete[prompt] & ~at_atom  # a given response at a level that no sample has
    values[between] = form.log_mean_density(low[between], high[between])
    return values
