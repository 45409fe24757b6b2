"""The optimum where a procedure is a functional of F and has no h: Newton on (1) with automatic differentiation.

In place of (5), its integral: log f = Phi / beta - log Z with Phi = dW / df, the functional derivative of (4). On the
Gauss nodes of panels in u, W is a function of the values of f alone, and Phi at a node is its derivative divided by the
node's weight. Gauss collocation is symplectic: this derivative of the discretized W is the discretized derivative, to
the order of the quadrature, and a jump of Phi (early_stop at its threshold) is there at the edge of a panel. The
functionals are differentiated by torch, pointwise procedures by their own h' and its differences.

Panels are kept in v = 1 - u: policies of high KL may put a little mass much closer to u = 1 than u can tell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iapo.errors import UserError
from iapo.procedures import Functional, Pairing
from iapo.quadrature import INTEGRALS, NODES, ORDER, nodes, partial_integrals, weights

Floats = NDArray[np.float64]

_STEP = 1e-6  # of the central differences of h'
_TOLERANCE = 1e-9  # of `residual`
_ROUGHLY = 1e-4  # of `residual` and of Newton's last step on the way
_TOP_MASS = 0.05  # of the last panel before u = 1, where the policy of a higher KL is steeper
_AWRY = 0.1  # of `residual`, where the panels are too coarse for the step
_HIGHEST = 1 - 1e-7  # win rate beyond which Phi / beta loses its digits
_DEEP, _TAIL = -60.0, 1e-4  # log f below which a defect counts by this factor
_MOST = 2000  # nodes
_BARYCENTRIC = 1 / np.array([np.prod(x - np.delete(NODES, i)) for i, x in enumerate(NODES)])


def corners(pairs: tuple[Pairing, ...]) -> Floats:
    """The u in (0, 1) where a functional of these pairs is not smooth, in increasing order."""
    return np.unique([u for _, *both in pairs for one in both if isinstance(one, Functional) for u in one.corners])


def law(functional: Functional, u: ArrayLike) -> tuple[Floats, Floats]:
    """CDF and density of the output where one sample is uniform, at u."""
    import torch

    at = torch.tensor(np.asarray(u, float), requires_grad=True)

    def uniform(points: Any) -> Any:
        return points if isinstance(points, torch.Tensor) else torch.as_tensor(points, dtype=torch.float64)

    output = functional.output_cdf(uniform, at)
    (slope,) = torch.autograd.grad(output.sum(), at)
    return output.detach().numpy(), slope.numpy()


def output_of(functional: Functional, cdf: Callable[[Floats], Floats], u: Floats) -> Floats:
    """CDF of the output at u for a policy with this CDF."""
    import torch

    def of_torch(points: Any) -> Any:
        return torch.as_tensor(cdf(np.asarray(points, float)), dtype=torch.float64)

    return functional.output_cdf(of_torch, torch.as_tensor(u)).numpy()


@dataclass(frozen=True, eq=False)
class Profile:
    """A stationary point of W - beta KL: log f at the Gauss nodes (panels, ORDER) between edges (panels + 1,) in v.

    tangent: the derivative of log f by the square root of the KL, of the same shape, where it is known.
    """

    edges: Floats
    log_f: Floats
    log_beta: float
    tangent: Floats | None = None

    @property
    def kl(self) -> float:
        """(2), in nats."""
        return float(np.sum(weights(self.edges) * np.exp(self.log_f) * self.log_f))

    def __call__(self, u: ArrayLike) -> Floats:
        """log f at u, by the polynomial of its panel; on an edge that of the panel at larger u."""
        return self.at(1 - np.asarray(u, float))

    def at(self, v: Floats, values: Floats | None = None) -> Floats:
        """log f, or what else has these values at the nodes, at u = 1 - v."""
        panel = np.clip(np.searchsorted(self.edges, v, side="left") - 1, 0, len(self.edges) - 2)
        difference = ((v - self.edges[panel]) / np.diff(self.edges)[panel])[..., None] - NODES
        pull = _BARYCENTRIC / np.where(difference == 0, 1e-30, difference)
        values = self.log_f if values is None else values
        return np.sum(pull * values[panel], axis=-1) / np.sum(pull, axis=-1)


@dataclass(frozen=True)
class Variation:
    """The solver of `iapo.paths` for pairs of which some procedure is a functional."""

    pairs: tuple[Pairing, ...]
    quick: ClassVar[int] = 5

    def start(self, kl: float, log_beta: float | None = None) -> Profile:
        """log f = (Phi - mean) / beta with the Phi of the reference."""
        phi = _first_order(self.pairs)
        spread = np.sqrt(np.sum(weights(phi.edges) * phi.log_f**2))
        size = min(np.sqrt(2 * kl), 0.2 * spread / np.max(np.abs(phi.log_f)))
        if log_beta is not None:
            size = min(size, spread * np.exp(-log_beta) / 2)
        profile = Profile(phi.edges, phi.log_f * size / spread, float(np.log(spread / size)))
        found = _newton(self.pairs, profile, kl=size**2 / 2)
        if found is None:
            raise UserError("no optimum was found near the reference; is the procedure's output_cdf a CDF, and smooth?")
        return found[0]

    def advance(self, profile: Profile, kl: float, before: Profile | None) -> tuple[Profile, int] | None:
        if self.win_rate(profile) > _HIGHEST:
            return None
        edges = _split(profile.edges, _defect(self.pairs, profile), _ROUGHLY)
        ahead = np.sqrt(kl) - np.sqrt(profile.kl)
        top = profile(1.0) + max(ahead, 0) * (
            0 if profile.tangent is None else profile.at(np.zeros(()), profile.tangent)
        )
        while edges[1] > max(_TOP_MASS * np.exp(-top), 1e-200):
            edges = np.insert(edges, 1, edges[1] / 2)
        moved = _moved(profile, edges)
        if profile.tangent is not None:
            log_f = moved.log_f + ahead * profile.at(nodes(moved.edges), profile.tangent)
            rate = (profile.log_beta - before.log_beta) / (profile.kl - before.kl) if before else 0.0
            moved = Profile(moved.edges, log_f, profile.log_beta + rate * (kl - profile.kl))
        found = _newton(self.pairs, moved, kl=kl, tolerance=_ROUGHLY)
        return found if found and residual(self.pairs, found[0]) < _AWRY else None

    def refine(self, profile: Profile, kl: float | None = None, log_beta: float | None = None) -> Profile | None:
        """On panels halved until the equation holds between the nodes."""
        found = _newton(self.pairs, profile, kl, log_beta)
        while found is not None:
            edges = _split(found[0].edges, _defect(self.pairs, found[0]), _TOLERANCE)
            if len(edges) == len(found[0].edges):
                return found[0]
            found = _newton(self.pairs, _moved(found[0], edges), kl, log_beta)
        return None

    def win_rate(self, profile: Profile) -> float:
        return _Discrete(self.pairs, profile).win_rate()

    def reached(self, profile: Profile) -> float | None:
        return self.win_rate(profile)


def first_order_of(pairs: tuple[Pairing, ...]) -> Callable[[ArrayLike], Floats]:
    """The Phi of the reference, (7), with Phi(0) = 0."""
    phi = _first_order(pairs)
    at_zero = phi(0.0)
    return lambda u: phi(u) - at_zero


def _first_order(pairs: tuple[Pairing, ...]) -> Profile:
    """The Phi of the reference, with mean 0, in place of log f, on panels that resolve it."""
    edges = np.unique(np.concatenate([np.linspace(0, 1, 5), 1 - corners(pairs)]))
    while True:
        coarse, fine = (
            Profile(at, _Discrete(pairs, Profile(at, np.zeros((len(at) - 1, ORDER)), 0.0)).transform(), 0.0)
            for at in (edges, _halved(edges))
        )
        scale = np.max(np.abs(fine.log_f))
        if not scale > 0:
            raise UserError("the win rate does not change near the reference for this opponent; choose another")
        finer = _split(edges, np.abs(coarse.at(nodes(fine.edges)) - fine.log_f) / scale, _ROUGHLY)
        if len(finer) == len(edges):
            return coarse
        edges = finer


def _halved(edges: Floats) -> Floats:
    return np.sort(np.concatenate([edges, (edges[1:] + edges[:-1]) / 2]))


def _split(edges: Floats, defect: Floats, tolerance: float) -> Floats:
    """The edges with the panels halved where the defect, given on all halves, is above a tolerance."""
    split = (defect.reshape(len(edges) - 1, -1).max(axis=1) > tolerance) & (np.diff(edges) > 1e-200)
    if (len(edges) - 1 + split.sum()) * ORDER > _MOST:
        return edges
    return np.sort(np.concatenate([edges, ((edges[1:] + edges[:-1]) / 2)[split]]))


def residual(pairs: tuple[Pairing, ...], profile: Profile) -> float:
    """The largest defect of (1) on panels half as wide, relative to 1 + |log f|; `_TAIL` of it where f is next to 0."""
    return float(np.max(_defect(pairs, profile)))


def _moved(profile: Profile, edges: Floats) -> Profile:
    """The same density on other panels."""
    return Profile(edges, profile.at(nodes(edges)), profile.log_beta)


def _defect(pairs: tuple[Pairing, ...], profile: Profile) -> Floats:
    """The defect of (1) at the nodes of panels half as wide, relative to 1 + |log f|; less where f is next to zero."""
    halved = _moved(profile, _halved(profile.edges))
    defect = halved.log_f - _Discrete(pairs, halved).transform() * np.exp(-profile.log_beta)
    defect = np.abs(defect - np.median(defect)) / (1 + np.abs(halved.log_f))
    return np.where(halved.log_f < _DEEP, _TAIL * defect, defect)


class _Discrete:
    """(4) as a function of f at the nodes of a profile, with its derivatives."""

    def __init__(self, pairs: tuple[Pairing, ...], profile: Profile) -> None:
        edges = profile.edges
        v, self.weights, self.f = (part.ravel() for part in (nodes(edges), weights(edges), np.exp(profile.log_f)))
        self.edges, self.u = edges, 1 - v
        self.shape = profile.log_f.shape
        self.functional = [(w, a, b) for w, a, b in pairs if isinstance(a, Functional)]
        self.pointwise = [(w, a, b) for w, a, b in pairs if not isinstance(a, Functional)]
        self.to_cdf = self._rows(v)  # the matrix from f to F - 1 at the nodes
        self.cdf = np.clip(1 + self.to_cdf @ self.f, 0, 1)

    def _rows(self, points: Floats) -> Floats:
        """The matrix from f at the nodes to F - 1 at points, given by their v: (points, nodes)."""
        panel = np.clip(np.searchsorted(self.edges, points, side="left") - 1, 0, len(self.edges) - 2)
        width = np.diff(self.edges)[panel]
        whole = np.arange(len(self.u)) // ORDER < panel[:, None]
        rows = np.where(whole, self.weights, 0.0)
        columns = panel[:, None] * ORDER + np.arange(ORDER)
        part = width[:, None] * partial_integrals((points - self.edges[panel]) / width)
        np.put_along_axis(rows, columns, part, axis=1)
        return -rows

    def _loss(self) -> tuple[Any, list[Any], Floats]:
        """The functionals' part of 1 - W, the tensors of values of F in it, and the matrix from f to all of these."""
        import torch

        u, at_u = torch.as_tensor(self.u), torch.tensor(self.cdf, requires_grad=True)
        values, rows = [at_u], [self.to_cdf]

        def cdf(points: Any) -> Any:
            if points is u:
                return at_u
            points = np.asarray(points, float)
            rows.append(self._rows(1 - points.ravel()))
            values.append(torch.tensor(1 + (rows[-1] @ self.f).reshape(points.shape), requires_grad=True))
            return values[-1]

        loss = sum(
            (torch.as_tensor(w * self.weights * b.density(self.u)) * a.output_cdf(cdf, u)).sum()
            for w, a, b in self.functional
        )
        return loss, values, np.concatenate(rows)

    def win_rate(self) -> float:
        """(4)."""
        loss = sum(w * np.sum(self.weights * a.cdf(self.cdf) * b.density(self.u)) for w, a, b in self.pointwise)
        return float(1 - loss - (self._loss()[0].item() if self.functional else 0))

    def transform(self) -> Floats:
        """Phi = dW / df at the nodes, with mean 0 under the reference: the shape of the profile's log f."""
        by_cdf = sum((w * a.density(self.cdf) * b.density(self.u) for w, a, b in self.pointwise), 0.0)
        gradient = (self.weights * by_cdf) @ self.to_cdf
        if self.functional:
            loss, values, rows = self._loss()
            gradient = gradient + _flat(_grad(loss, values)) @ rows
        phi = -gradient / self.weights
        return (phi - np.sum(self.weights * phi)).reshape(self.shape)

    def curvature(self) -> Floats:
        """d Phi / d f: (nodes, nodes)."""
        up, down = np.minimum(self.cdf + _STEP, 1), np.maximum(self.cdf - _STEP, 0)
        by_cdf = sum(
            (w * b.density(self.u) * (a.density(up) - a.density(down)) / (up - down) for w, a, b in self.pointwise), 0.0
        )
        diagonal, rows = self.weights * by_cdf, self.to_cdf
        if not self.functional:
            return -self._doubled(diagonal) / self.weights[:, None]
        loss, values, all_rows = self._loss()
        by_nodes, across, others = _hessian(loss, values)
        few = all_rows[len(rows) :]
        mixed = (rows.T @ across) @ few
        inner = (
            self._doubled(diagonal + by_nodes) if by_nodes.ndim == 1 else rows.T @ (np.diag(diagonal) + by_nodes) @ rows
        )
        return -(inner + mixed + mixed.T + few.T @ others @ few) / self.weights[:, None]

    def _doubled(self, diagonal: Floats) -> Floats:
        """to_cdf.T @ diag(diagonal) @ to_cdf, for which panels above a node's own count by their weights alone."""
        panels = np.repeat(np.arange(self.shape[0]), ORDER)
        d, w = diagonal.reshape(self.shape), self.weights.reshape(self.shape)
        part = np.diff(self.edges)[:, None, None] * INTEGRALS
        behind = np.append(np.cumsum(d.sum(axis=1)[::-1])[-2::-1], 0)  # of panels at smaller u
        both = (w * behind[:, None] + np.sum(d[..., None] * part, axis=1)).ravel()
        outer = np.outer(both, self.weights)
        found = np.where(panels[:, None] > panels, outer, outer.T)
        own = behind[:, None, None] * w[:, :, None] * w[:, None] + np.swapaxes(part, 1, 2) @ (d[..., None] * part)
        panel = np.arange(self.shape[0])
        found.reshape(*self.shape, *self.shape)[panel, :, panel] = own
        return found


def _grad(output: Any, inputs: list[Any], create_graph: bool = False) -> list[Any]:
    """Derivatives by each input, zeros where the output does not depend on it."""
    import torch

    if not output.requires_grad:
        return [torch.zeros_like(one) for one in inputs]
    found = torch.autograd.grad(output, inputs, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(one) if part is None else part for one, part in zip(inputs, found, strict=True)]


def _flat(parts: list[Any]) -> Floats:
    return np.concatenate([part.detach().numpy().ravel() for part in parts])


def _hessian(loss: Any, values: list[Any]) -> tuple[Floats, Floats, Floats]:
    """The second derivatives of the loss, one row a backward pass: by nodes, by nodes and others, by others.

    Where the block of the nodes themselves is diagonal, as it is if the output at u depends on F at u and at a few
    points, its product with one vector is all of it; the product with another, at random, tells. Then the first is
    given as its diagonal, (nodes,).
    """
    import torch

    first = _grad(loss, values, create_graph=True)
    count = values[0].numel()
    probe = torch.as_tensor(np.random.default_rng(0).normal(size=count))
    diagonal = _flat(_grad(first[0].sum(), values))[:count]
    product = _flat(_grad((first[0] * probe).sum(), values))[:count]
    others = [_flat(_grad(one, values)) for part in first[1:] for one in part.ravel()]
    by_others = np.reshape(others, (len(others), -1)) if others else np.zeros((0, count))
    across, few = by_others[:, :count].T, by_others[:, count:]
    if np.allclose(product, diagonal * probe.numpy(), rtol=1e-9, atol=1e-12 * np.max(np.abs(diagonal), initial=0)):
        return diagonal, across, few
    return np.array([_flat(_grad(one, values))[:count] for one in first[0].ravel()]), across, few


def _newton(
    pairs: tuple[Pairing, ...],
    profile: Profile,
    kl: float | None = None,
    log_beta: float | None = None,
    tolerance: float = 1e-11,
) -> tuple[Profile, int] | None:
    """Solve (1) at a KL or a log beta: the solution and its iterations, None if there is none."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = _iterate(pairs, profile, kl, log_beta, tolerance)
    return found if found and np.all(np.isfinite(found[0].log_f)) else None


def _iterate(
    pairs: tuple[Pairing, ...], profile: Profile, kl: float | None, log_beta: float | None, tolerance: float
) -> tuple[Profile, int] | None:
    previous, log_z = np.inf, 0.0
    for iteration in range(1, 16):
        discrete = _Discrete(pairs, profile)
        size = len(discrete.u)
        log_f, mass = profile.log_f.ravel(), discrete.weights * discrete.f
        phi = discrete.transform().ravel() * np.exp(-profile.log_beta)
        if iteration == 1:
            log_z = float(np.sum(mass * (phi - log_f)) / np.sum(mass))
        system = np.zeros((size + 2, size + 2))
        system[:size, :size] = np.eye(size) - discrete.curvature() * discrete.f * np.exp(-profile.log_beta)
        system[:size, size], system[:size, size + 1] = 1, phi
        right = np.append(phi - log_z - log_f, [1 - np.sum(mass), 0])
        system[size, :size] = mass
        if log_beta is not None:
            system[-1, -1], right[-1] = 1, log_beta - profile.log_beta
        else:
            system[-1, :size], right[-1] = mass * (1 + log_f), (kl or 0) - np.sum(mass * log_f)
        further = np.zeros(size + 2)  # on the path
        further[-1] = 2 * np.sqrt(max(float(np.sum(mass * log_f)), 0))
        try:
            step, tangent = np.linalg.solve(system, np.stack([right, further], axis=1)).T
        except np.linalg.LinAlgError:
            return None
        change = max(np.max(np.abs(step[:size]) / (1 + np.abs(log_f))), abs(step[-1]) / 2)
        if not np.isfinite(change) or (iteration > 5 and change > 1):
            return None
        damping = min(1.0, 1 / change)
        moved = profile.log_f + damping * step[:size].reshape(profile.log_f.shape)
        log_z += damping * step[size]
        reached = profile.log_beta + float(damping * step[-1])
        ahead = tangent[:size].reshape(moved.shape) if log_beta is None else None
        profile = Profile(profile.edges, moved, reached, ahead)
        if change < tolerance or previous < change < 1e-6:
            return profile, iteration
        previous = change
    return None
