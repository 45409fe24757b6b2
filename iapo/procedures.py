"""Procedures: what is done with samples at inference, as maps of the CDF of one sample (arXiv 2412.19792).

A procedure that looks only at ranks turns the CDF F of one sample's calibrated reward into h(F). A new one is a frozen
dataclass with `cdf` (h) and `log_density` (log h'); everything else, solver included, follows from these two.

Where no such h exists, because what comes out at u depends on more of F than F(u), a new one is a `Functional`: a
frozen dataclass with `output_cdf`, whose derivative is taken by automatic differentiation.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaincc, betaln, gammaln, logsumexp, xlog1py, xlogy

from iapo.errors import UserError
from iapo.syntax import Reader, number

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
MOST_SAMPLES = 65_536  # that a procedure may draw; the solver of `iapo.optimum` was tried up to here
_LEAST = 1e-290  # of a survival function, below which it has lost its digits


class Procedure:
    """The interface: `cdf` is h, `log_density` is log h', both on arrays of p in [0, 1], of the same shape."""

    def cdf(self, p: ArrayLike) -> Floats:
        """h(p): the CDF of the procedure's output where that of one sample is p."""
        raise NotImplementedError

    def log_density(self, p: ArrayLike) -> Floats:
        """log h'(p); minus infinity where h' is zero."""
        raise NotImplementedError

    def log_density_of_logs(self, log_p: Floats, log_q: Floats) -> Floats:
        """log h'(p) from log p and log(1 - p), both finite; worth a formula where p or 1 - p has lost digits."""
        return self.log_density(np.exp(log_p))

    def log_survival(self, p: ArrayLike) -> Floats:
        """log(1 - h(p)); worth a formula of its own where 1 - h becomes smaller than rounding errors of h."""
        with np.errstate(divide="ignore"):
            return np.log1p(-self.cdf(p))

    def density(self, p: ArrayLike) -> Floats:
        """h'(p)."""
        return np.exp(self.log_density(p))


class Functional(Procedure):
    """A procedure whose output's CDF is a functional of F. `cdf` and `log_density` are its law under the reference.

    So they serve for an opponent only; what is drawn from a policy follows from `output_cdf`.
    """

    @property
    def corners(self) -> tuple[float, ...]:
        """The u inside (0, 1) where the output's CDF is not smooth, or that it depends on by themselves."""
        return ()

    def output_cdf(self, cdf: "Callable[[Any], Tensor]", u: "Tensor") -> "Tensor":
        """P(output <= u) as a torch expression of F: `cdf` takes u itself, a number or a tensor of fixed points."""
        raise NotImplementedError

    def cdf(self, p: ArrayLike) -> Floats:
        from iapo.functionals import law

        return law(self, p)[0]

    def log_density(self, p: ArrayLike) -> Floats:
        from iapo.functionals import law

        with np.errstate(divide="ignore"):
            return np.log(law(self, p)[1])


@dataclass(frozen=True)
class Sample(Procedure):
    """One sample: h(p) = p."""

    def cdf(self, p: ArrayLike) -> Floats:
        return np.asarray(p, float)

    def log_density(self, p: ArrayLike) -> Floats:
        return np.zeros_like(p, float)

    def __str__(self) -> str:
        return "sample"


@dataclass(frozen=True)
class BestOf(Procedure):
    """The best of n samples: h(p) = p^n."""

    n: int

    def __post_init__(self) -> None:
        _require_count("best_of", "n", self.n)

    def cdf(self, p: ArrayLike) -> Floats:
        return np.asarray(p, float) ** self.n

    def log_density(self, p: ArrayLike) -> Floats:
        return np.log(self.n) + xlogy(self.n - 1, p)

    def log_density_of_logs(self, log_p: Floats, log_q: Floats) -> Floats:
        return np.log(self.n) + (self.n - 1) * log_p

    def __str__(self) -> str:
        return f"best_of({self.n})"


@dataclass(frozen=True)
class WorstOf(Procedure):
    """The worst of n samples, as under n jailbreak attempts: h(p) = 1 - (1 - p)^n."""

    n: int

    def __post_init__(self) -> None:
        _require_count("worst_of", "n", self.n)

    def cdf(self, p: ArrayLike) -> Floats:
        return -np.expm1(xlog1py(self.n, -np.asarray(p, float)))

    def log_survival(self, p: ArrayLike) -> Floats:
        return xlog1py(self.n, -np.asarray(p, float))

    def log_density(self, p: ArrayLike) -> Floats:
        return np.log(self.n) + xlog1py(self.n - 1, -np.asarray(p, float))

    def log_density_of_logs(self, log_p: Floats, log_q: Floats) -> Floats:
        return np.log(self.n) + (self.n - 1) * log_q

    def __str__(self) -> str:
        return f"worst_of({self.n})"


@dataclass(frozen=True)
class Kth(Procedure):
    """The k-th smallest of n samples: h(p) = I_p(k, n - k + 1), the regularized incomplete beta function."""

    k: int
    n: int

    def __post_init__(self) -> None:
        _require_count("kth", "n", self.n)
        _require_count("kth", "k", self.k)
        if self.k > self.n:
            raise UserError(f"kth({self.k}, {self.n}): k must be at most n; give kth(k, n) with 1 <= k <= n")

    def cdf(self, p: ArrayLike) -> Floats:
        return betainc(self.k, self.n - self.k + 1, p)

    def log_survival(self, p: ArrayLike) -> Floats:
        p = np.asarray(p, float)
        survival = np.asarray(betaincc(self.k, self.n - self.k + 1, p))
        lost = survival < _LEAST
        with np.errstate(divide="ignore"):
            found = np.array(np.log(survival))
        found[lost] = self._log_of_fewer(p[lost])
        return found

    def _log_of_fewer(self, p: Floats) -> Floats:
        """log P(fewer than k of n are below p), by their sum."""
        j = np.arange(self.k)
        ways = gammaln(self.n + 1) - gammaln(j + 1) - gammaln(self.n - j + 1)
        return logsumexp(ways + xlogy(j, p[..., None]) + xlog1py(self.n - j, -p[..., None]), axis=-1)

    def log_density(self, p: ArrayLike) -> Floats:
        p = np.asarray(p, float)
        return xlogy(self.k - 1, p) + xlog1py(self.n - self.k, -p) - betaln(self.k, self.n - self.k + 1)

    def log_density_of_logs(self, log_p: Floats, log_q: Floats) -> Floats:
        return (self.k - 1) * log_p + (self.n - self.k) * log_q - betaln(self.k, self.n - self.k + 1)

    def __str__(self) -> str:
        return f"kth({self.k}, {self.n})"


@dataclass(frozen=True)
class BestOfPoisson(Procedure):
    """The best of Poisson(mu) + 1 samples: h(p) = p exp(mu (p - 1))."""

    mu: float

    def __post_init__(self) -> None:
        if not (isfinite(self.mu) and self.mu >= 0):
            raise UserError(f"best_of_poisson({self.mu}): mu must be a finite number, at least 0")

    def cdf(self, p: ArrayLike) -> Floats:
        p = np.asarray(p, float)
        return p * np.exp(self.mu * (p - 1))

    def log_density(self, p: ArrayLike) -> Floats:
        p = np.asarray(p, float)
        return np.log1p(self.mu * p) + self.mu * (p - 1)

    def __str__(self) -> str:
        return f"best_of_poisson({number(self.mu)})"


@dataclass(frozen=True)
class EarlyStop(Functional):
    """Draw until a calibrated reward is at least tau, at most n times; the best if none is.

    With q = F(tau), the output is the best of n below tau with probability q^n, else a draw from above tau:
    F(u)^n below tau and 1 - (1 - F(u)) (1 - q^n) / (1 - q) above.
    """

    n: int
    tau: float

    def __post_init__(self) -> None:
        _require_count("early_stop", "n", self.n)
        if not 0 < self.tau < 1:
            raise UserError(f"early_stop({self.n}, {number(self.tau)}): tau must be a quantile between 0 and 1")

    @property
    def corners(self) -> tuple[float, ...]:
        return (self.tau,)

    def output_cdf(self, cdf: "Callable[[Any], Tensor]", u: "Tensor") -> "Tensor":
        import torch

        q, p = cdf(self.tau), cdf(u)
        # their expected number, (1 - q^n) / (1 - q) unless q is 1; torch's second derivative of q^0 at 0 is NaN
        draws = 1 + (q ** torch.arange(1, self.n)).sum()
        return torch.where(u < self.tau, p**self.n, 1 - (1 - p) * draws)

    def cdf(self, p: ArrayLike) -> Floats:
        p = np.asarray(p, float)
        return np.where(p < self.tau, p**self.n, 1 - (1 - p) * self._draws)

    def log_density(self, p: ArrayLike) -> Floats:
        p = np.asarray(p, float)
        return np.where(p < self.tau, np.log(self.n) + xlogy(self.n - 1, p), np.log(self._draws))

    @property
    def _draws(self) -> float:
        return float(np.sum(self.tau ** np.arange(self.n)))

    def __str__(self) -> str:
        return f"early_stop({self.n}, {number(self.tau)})"


@dataclass(frozen=True)
class Mixture(Procedure):
    """A deployment drawn at random: `parts` holds (weight, procedure) pairs, the weights summing to 1."""

    parts: tuple[tuple[float, Procedure], ...]

    def __post_init__(self) -> None:
        if any(isinstance(procedure, Mixture) for _, procedure in self.parts):
            raise UserError("a mixture of mixtures: write it as one mixture of procedures")
        if not all(isfinite(weight) and weight > 0 for weight, _ in self.parts):
            raise UserError(f"mixture {self}: every weight must be a positive number")
        total = sum(weight for weight, _ in self.parts)
        if abs(total - 1) > 1e-9:
            raise UserError(f"mixture {self}: the weights sum to {number(total)}; give weights that sum to 1")

    def cdf(self, p: ArrayLike) -> Floats:
        return np.asarray(sum(weight * procedure.cdf(p) for weight, procedure in self.parts))

    def log_survival(self, p: ArrayLike) -> Floats:
        terms = [np.log(weight) + procedure.log_survival(p) for weight, procedure in self.parts]
        return np.logaddexp.reduce(np.stack(terms))

    def log_density(self, p: ArrayLike) -> Floats:
        terms = [np.log(weight) + procedure.log_density(p) for weight, procedure in self.parts]
        return np.logaddexp.reduce(np.stack(terms))

    def __str__(self) -> str:
        return " + ".join(f"{number(weight)} {procedure}" for weight, procedure in self.parts)


def sample() -> Sample:
    """One sample."""
    return Sample()


def best_of(n: int) -> BestOf:
    """The best of n samples."""
    return BestOf(n)


def worst_of(n: int) -> WorstOf:
    """The worst of n samples."""
    return WorstOf(n)


def kth(k: int, n: int) -> Kth:
    """The k-th smallest of n samples."""
    return Kth(k, n)


def best_of_poisson(mu: float) -> BestOfPoisson:
    """The best of Poisson(mu) + 1 samples."""
    return BestOfPoisson(mu)


def early_stop(n: int, tau: float) -> EarlyStop:
    """Draw until a calibrated reward is at least tau, at most n times; the best if none is."""
    return EarlyStop(n, tau)


def mixture(*terms: tuple[float, Procedure]) -> Mixture:
    """A deployment drawn at random: mixture((0.5, sample()), (0.5, best_of(8)))."""
    return Mixture(terms)


_CONSTRUCTORS: dict[str, type[Procedure]] = {
    "sample": Sample,
    "best_of": BestOf,
    "worst_of": WorstOf,
    "kth": Kth,
    "best_of_poisson": BestOfPoisson,
    "early_stop": EarlyStop,
}


def parse_procedure(text: str) -> Procedure:
    """Read a procedure: sample, best_of(4), worst_of(4), kth(3, 5), best_of_poisson(3), early_stop(8, 0.8), mixtures.

    Raises UserError, pointing at the offending character.
    """
    reader = Reader(text, "procedure", "best_of(4), worst_of(4), kth(3, 5) or 0.5 sample + 0.5 best_of(8)")
    terms = [_term(reader)]
    while reader.take("sign", "+"):
        terms.append(_term(reader))
    reader.end()
    if len(terms) == 1 and terms[0][0] is None:
        return terms[0][1]
    if any(weight is None for weight, _ in terms):
        raise UserError(
            f"procedure {text!r}: every term of a mixture needs a weight, as in 0.5 sample + 0.5 best_of(8)"
        )
    return Mixture(tuple((weight, procedure) for weight, procedure in terms if weight is not None))


def _term(reader: Reader) -> tuple[float | None, Procedure]:
    """One `[weight] name(arguments)`."""
    weight = reader.take("number")
    if weight:
        reader.take("sign", "*")
    name, arguments = reader.call(_CONSTRUCTORS)
    parameters = [field.name for field in fields(_CONSTRUCTORS[name.text])]  # type: ignore[arg-type]
    if len(arguments) != len(parameters):
        needed = f"needs {name.text}({', '.join(parameters)})" if parameters else "takes no arguments"
        raise reader.error(name.position, f"{name.text} {needed}, {len(arguments)} given")
    try:
        procedure = _CONSTRUCTORS[name.text](*(int(a) if a.is_integer() else a for a in arguments))
    except UserError as error:
        raise reader.error(name.position, str(error)) from None
    return (float(weight.text) if weight else None), procedure


def as_procedure(procedure: "str | Procedure") -> Procedure:
    """The procedure itself, or the one that the text describes."""
    return parse_procedure(procedure) if isinstance(procedure, str) else procedure


Pairing = tuple[float, Procedure, Procedure]


def pairings(procedure: Procedure, opponent: Procedure | None = None) -> tuple[Pairing, ...]:
    """The (weight, policy's procedure, opponent's procedure) terms whose weighted sum of (4) is the win rate.

    A mixture against itself (the default) is one deployment drawn for both sides; against another opponent the two
    sides are drawn independently.
    """
    if opponent is None or opponent == procedure:
        return tuple((weight, part, part) for weight, part in _parts(procedure))
    return tuple(
        (weight * weight_b, part, part_b) for weight, part in _parts(procedure) for weight_b, part_b in _parts(opponent)
    )


def has_functional(pairs: tuple[Pairing, ...]) -> bool:
    """Whether (5) is not enough for these."""
    return any(isinstance(one, Functional) for _, *both in pairs for one in both)


def _parts(procedure: Procedure) -> tuple[tuple[float, Procedure], ...]:
    return procedure.parts if isinstance(procedure, Mixture) else ((1.0, procedure),)


def _require_count(name: str, parameter: str, value: int) -> None:
    if not isinstance(value, int | np.integer) or not 1 <= value <= MOST_SAMPLES:
        raise UserError(f"{name}: {parameter} = {value} given, a whole number from 1 to {MOST_SAMPLES} expected")
