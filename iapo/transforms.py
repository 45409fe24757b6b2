"""Transforms: the function Phi of the calibrated reward that training maximizes, as in (1).

`Optimal` and `FirstOrder` depend on the procedure and the opponent, and are worked out in `iapo.closed_form`; the
others are plain functions of u in [0, 1]. Adding a constant to Phi changes nothing.
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iapo.errors import UserError
from iapo.syntax import Reader, number

Floats = NDArray[np.float64]


class Transform:
    """The interface of a plain transform: an instance is called on an array of u in [0, 1]."""

    def __call__(self, u: ArrayLike) -> Floats:
        """Phi(u)."""
        raise NotImplementedError

    @property
    def corners(self) -> Floats:
        """The u inside (0, 1) where Phi is not smooth."""
        return np.empty(0)


@dataclass(frozen=True)
class Identity(Transform):
    """Phi(u) = u: optimal for the win rate of one sample."""

    def __call__(self, u: ArrayLike) -> Floats:
        return np.asarray(u, float)

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True)
class ExpTilt(Transform):
    """Phi(u) = sign(t) e^(t u), the family of arXiv 2412.19792: t > 0 for best_of, t < 0 for worst_of."""

    t: float

    def __post_init__(self) -> None:
        if not 0 < abs(self.t) <= 700:
            raise UserError(
                f"exp_tilt({number(self.t)}): t must be between -700 and 700 and not 0; for t near 0 use identity"
            )

    def __call__(self, u: ArrayLike) -> Floats:
        return np.sign(self.t) * np.exp(self.t * np.asarray(u, float))

    def __str__(self) -> str:
        return f"exp_tilt({number(self.t)})"


@dataclass(frozen=True)
class Log(Transform):
    """Phi(u) = log u, best-of-n distillation: f is proportional to u^(1/beta)."""

    def __call__(self, u: ArrayLike) -> Floats:
        with np.errstate(divide="ignore"):
            return np.log(np.asarray(u, float))

    def __str__(self) -> str:
        return "log"


@dataclass(frozen=True)
class Table(Transform):
    """Any function, by its values at evenly spaced u from 0 to 1, linear in between."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2 or not all(isfinite(value) for value in self.values):
            raise UserError("table: at least two finite values expected, those of the transform at u = 0, ..., 1")
        if min(self.values) == max(self.values):
            raise UserError("table: all values are equal, which asks for no change; give a function that varies")

    def __call__(self, u: ArrayLike) -> Floats:
        return np.interp(np.asarray(u, float), np.linspace(0, 1, len(self.values)), self.values)

    @property
    def corners(self) -> Floats:
        return np.linspace(0, 1, len(self.values))[1:-1]

    def __str__(self) -> str:
        return f"table({', '.join(number(value) for value in self.values)})"


@dataclass(frozen=True)
class FirstOrder:
    """Phi'(u) = h_a'(u) h_b'(u): the optimum in the limit of small KL, (7)."""

    def __str__(self) -> str:
        return "first_order"


@dataclass(frozen=True)
class Optimal:
    """Phi'(u) = h_a'(F(u)) h_b'(u): the optimum of (4) at the given KL, (5)."""

    def __str__(self) -> str:
        return "optimal"


AnyTransform = Transform | FirstOrder | Optimal


def identity() -> Identity:
    """Phi(u) = u."""
    return Identity()


def exp_tilt(t: float) -> ExpTilt:
    """Phi(u) = sign(t) e^(t u)."""
    return ExpTilt(t)


def log() -> Log:
    """Phi(u) = log u."""
    return Log()


def table(values: ArrayLike) -> Table:
    """Phi by its values at evenly spaced u from 0 to 1, linear in between."""
    return Table(tuple(float(value) for value in np.ravel(values)))


def first_order() -> FirstOrder:
    """The optimum in the limit of small KL, (7)."""
    return FirstOrder()


def optimal() -> Optimal:
    """The optimum of (4) at the given KL."""
    return Optimal()


_PLAIN: dict[str, AnyTransform] = {
    str(transform): transform for transform in (Optimal(), Identity(), Log(), FirstOrder())
}
NAMES = (*_PLAIN, "exp_tilt", "table")


def parse_transform(text: str) -> AnyTransform:
    """Read a transform: optimal, identity, log, first_order, exp_tilt(10) or table(0, 0.2, 1).

    Raises UserError, pointing at the offending character.
    """
    reader = Reader(text, "transform", "optimal, identity, log, first_order, exp_tilt(10) or table(0, 0.2, 1)")
    name, arguments = reader.call(NAMES)
    reader.end()
    if name.text in _PLAIN:
        if arguments:
            raise reader.error(name.position, f"{name.text} takes no arguments, {len(arguments)} given")
        return _PLAIN[name.text]
    if name.text == "exp_tilt" and len(arguments) != 1:
        raise reader.error(name.position, f"exp_tilt needs exp_tilt(t), {len(arguments)} given")
    try:
        return ExpTilt(arguments[0]) if name.text == "exp_tilt" else Table(tuple(arguments))
    except UserError as error:
        raise reader.error(name.position, str(error)) from None


def as_transform(transform: str | AnyTransform) -> AnyTransform:
    """The transform itself, or the one that the text describes."""
    return parse_transform(transform) if isinstance(transform, str) else transform
