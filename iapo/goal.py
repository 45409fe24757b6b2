"""What a run trains for: the closed form at one beta for all of its training prompts, where rewards tie too.

Without ties the closed form has the same KL for every prompt. With them equation (8) is solved on a prompt's own reward
levels, and at one beta the KL is another for every prompt; the beta sought is that at which its mean is what was asked
for. No other division of a KL among prompts wins more.
"""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from iapo.atoms import Aim, Prompts, beta_at_kl, kl_at, means_of, prompts_with, win_rate_at
from iapo.closed_form import ClosedForm, solve
from iapo.config import Config, ObjectiveConfig
from iapo.levels import level_counts, share_at_the_top, tied_levels, which_tie
from iapo.procedures import as_procedure, has_functional, pairings
from iapo.store import read_table
from iapo.targets import solve_objective
from iapo.transforms import as_transform

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

MOST_KL, MOST_UNTIED_KL = 0.95, 10.0
"""A prompt whose rewards tie can have this share of the KL of always giving the best response that was seen, for all of
it takes targets of minus infinity; a prompt without ties so many nats."""
JUDGED = 512
"""So many training prompts, evenly spaced, tell what can be won: to better than a point."""


@dataclass(frozen=True)
class Goal:
    """What a policy is trained for on given prompts.

    form: its log f are the targets of ranks, (3), and its beta is that of tied levels, (8). kl (nats): the mean over
    prompts that the policy is to have. win_rate: what the transform wins at that KL, mean over prompts. tied_prompts:
    how many training prompts (8) applies to.
    """

    form: ClosedForm
    kl: float
    win_rate: float
    tied_prompts: int

    def record(self) -> dict[str, float]:
        """What the manifest of `train` has of it."""
        return {
            "beta": self.form.beta,
            "kl": self.kl,
            "win_rate": self.win_rate,
            "tied_prompts": self.tied_prompts,
        }


def training_goal(config: Config) -> Goal:
    """The goal of a run, from the reference rewards of its training prompts."""
    quantiles = read_table(config.run / "quantiles.parquet").select(["prompt_id", "rewards"]).to_pandas()
    prompts = read_table(config.run / "prompts.parquet").select(["prompt_id", "split"]).to_pandas()
    training = quantiles.merge(prompts[prompts["split"] == "train"], on="prompt_id", validate="one_to_one")
    return solve_goal(config.objective, training.sort_values("prompt_id")["rewards"].tolist(), config.seed)


def solve_goal(objective: ObjectiveConfig, rewards: list[Floats], seed: int = 0) -> Goal:
    """The goal of an objective on prompts with these sorted reference rewards.

    KLs are means over the prompts that teach something, by the levels that their samples show, for such are the
    targets. What can be won is a matter of the levels that prompts have: as in `evaluate` these are drawn
    (`iapo.levels`), and for functionals of F it is (4), as if nothing tied. `target_win_rate` takes the KL where that
    can be won. UserError where it cannot.
    """
    teaching = [one for one in rewards if one[0] < one[-1]]
    ties = which_tie(teaching)
    if not ties.any():
        form = solve_objective(objective)
        return Goal(form, form.kl, form.win_rate, 0)
    tied = [one for one, its_ties in zip(teaching, ties, strict=True) if its_ties]
    shown = prompts_with(level_counts(tied), len(teaching) - len(tied))
    policy = as_procedure(objective.procedure)
    opponent = as_procedure(objective.opponent) if objective.opponent else policy
    aim = Aim(policy, opponent, as_transform(objective.transform))
    judged = _judged(aim, rewards, seed)
    if objective.beta is not None:
        form, kl = solve_objective(objective), means_of(shown, aim, objective.beta).kl
    else:
        kl = _within_reach(_kl_asked(objective, judged, aim), tied, len(teaching) - len(tied))
        form = solve(*aim, beta=beta_at_kl(shown, aim, kl))
    if judged is None:
        return Goal(form, kl, solve(*aim, target_kl=kl).win_rate, len(tied))
    return Goal(form, kl, win_rate_at(judged, aim, kl), len(tied))


def untied_form(objective: ObjectiveConfig, record: dict[str, float]) -> ClosedForm:
    """What calibrated rewards without ties follow at the KL of a goal, of which this is the record."""
    if not record["tied_prompts"]:
        return solve_objective(objective)
    return solve(objective.procedure, objective.opponent, objective.transform, target_kl=record["kl"])


def _judged(aim: Aim, rewards: list[Floats], seed: int) -> Prompts | None:
    """Prompts that tell what can be won; None where (4) does for all of them."""
    if has_functional(pairings(aim.procedure, aim.opponent)):
        return None
    chosen = np.linspace(0, len(rewards) - 1, min(len(rewards), JUDGED)).astype(int)
    masses, untied = tied_levels([rewards[i] for i in chosen], seed)
    return prompts_with(masses, untied) if len(masses) else None


def _kl_asked(objective: ObjectiveConfig, judged: Prompts | None, aim: Aim) -> float:
    """The KL of target_kl or target_win_rate, in nats."""
    if objective.target_kl is not None:
        return objective.target_kl
    if judged is None or objective.target_win_rate is None:
        return solve_objective(objective).kl
    return kl_at(judged, aim, objective.target_win_rate)


def _within_reach(kl: float, tied: list[Floats], untied: int) -> float:
    """The mean KL asked for, or if less the most that targets can have, with a warning."""
    top = MOST_KL * float(-np.log(share_at_the_top(tied)).sum()) + MOST_UNTIED_KL * untied
    most = top / (len(tied) + untied)
    if kl > most:
        log.warning(
            "train: %.3g nats asked for; where rewards tie as here, there is little more than %.3g to spend (at most "
            "-log of the share of the best level of a prompt); going for these: ask for less, or give more samples a "
            "prompt or a reward of more levels",
            *(kl, most),
        )
    return min(kl, most)
