"""What is lost by deploying another n than the one trained for, and what each n can win at a fixed KL."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iapo.closed_form import solve
from iapo.errors import UserError
from iapo.procedures import Procedure, parse_procedure

Floats = NDArray[np.float64]
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Robustness:
    """Policies trained for each size of a family of procedures at one KL (nats), and deployed with each.

    win_rates[i, j]: of the optimum for sizes[i], deployed with sizes[j] on both sides. identity[j]: of the identity
    transform, which is what plain RLHF trains for, at the same KL. So the diagonal of win_rates is the best there is.
    """

    family: str
    kl: float
    sizes: tuple[int, ...]
    win_rates: Floats
    identity: Floats

    @property
    def losses(self) -> Floats:
        """Win rate lost, by (trained, deployed), to a policy trained for the size that is deployed: at least 0."""
        return np.diag(self.win_rates) - self.win_rates


def robustness(family: str, target_kl: float, sizes: Sequence[int] = SIZES) -> Robustness:
    """Train for each size, deploy with each: family is a procedure with n for the size, such as best_of(n).

    Equation (4) at every pair. Raises UserError for a family without n, or a size that the procedure cannot have.
    """
    if not re.search(r"\bn\b", family):
        raise UserError(f"family {family!r}: no n in it; write for example best_of(n) or 0.5 sample + 0.5 best_of(n)")
    if not sizes or any(size < 1 for size in sizes):
        raise UserError(f"sizes {list(sizes)} given; whole numbers of at least 1 expected")
    distinct = tuple(sorted(set(sizes)))
    procedures = [_member(family, size) for size in distinct]
    trained = [solve(procedure, target_kl=target_kl) for procedure in procedures]
    plain = solve("sample", transform="identity", target_kl=target_kl)
    win_rates = np.array([[form.win_rate_under(other) for other in procedures] for form in trained])
    identity = np.array([plain.win_rate_under(other) for other in procedures])
    return Robustness(family, target_kl, distinct, win_rates, identity)


def _member(family: str, size: int) -> Procedure:
    return parse_procedure(re.sub(r"\bn\b", str(size), family))
