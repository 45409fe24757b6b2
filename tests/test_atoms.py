"""Ties, equation (8): by hand, by brute-force optimization, and against the continuous closed form."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from iapo.atoms import atom_kl, atom_log_density, atom_win_rate, tie_pattern
from iapo.closed_form import solve
from iapo.errors import UserError
from iapo.procedures import pairings, parse_procedure


def test_binary_verifier_by_hand():
    """Pass rate 0.2, n = 4, beta = 0.2; then (8) and the win rate of pass@4 written out for two atoms."""
    form = solve("best_of(4)", beta=0.2)
    log_f = atom_log_density([[0.8, 0.2]], form)
    np.testing.assert_allclose(np.exp(log_f), [[0.639590, 2.441641]], atol=1e-6)
    fail, ref_fail = 0.8 * np.exp(log_f[0, 0]), 0.8
    assert log_f[0, 1] - log_f[0, 0] == pytest.approx(4 * fail**3 * 1 / (2 * 0.2), abs=1e-12)
    passed, ref_passed = 1 - fail**4, 1 - ref_fail**4
    by_hand = passed * (1 - ref_passed) + (passed * ref_passed + (1 - passed) * (1 - ref_passed)) / 2
    win_rate = atom_win_rate([[0.8, 0.2]], log_f, pairings(form.procedure))
    assert win_rate[0] == pytest.approx(by_hand, abs=1e-12) == pytest.approx(0.670528, abs=1e-6)
    assert atom_kl([[0.8, 0.2]], log_f)[0] == pytest.approx(0.207235, abs=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(
    ("procedure", "opponent"),
    [
        ("best_of(4)", None),
        ("worst_of(4)", None),
        ("kth(3, 5)", None),
        ("worst_of(8)", "best_of(8)"),
        ("0.5 worst_of(6) + 0.5 best_of(6)", None),
    ],
)
def test_against_brute_force_optimization(procedure, opponent, beta):
    """W - beta KL over all densities on random atoms, from many starts: no better value exists."""
    random = np.random.default_rng(7)
    form = solve(procedure, opponent, beta=beta)
    pairs = pairings(form.procedure, form.opponent)
    for atoms in (2, 3, 5):
        masses = random.dirichlet(np.ones(atoms))[None]

        def value(logits, masses=masses):
            log_f = logits - logsumexp(logits, b=masses[0])
            return atom_win_rate(masses, log_f[None], pairs)[0] - beta * atom_kl(masses, log_f[None])[0]

        found = atom_log_density(masses, form)[0]
        starts = [np.zeros(atoms), *(random.normal(size=(12, atoms)) * 3)]
        best = max(-minimize(lambda x, value=value: -value(x), start, method="BFGS").fun for start in starts)
        assert value(found) >= best - 1e-9
        assert np.sum(masses * np.exp(found)) == pytest.approx(1, abs=1e-12)


def best_on_a_grid(masses, pairs, beta):
    """The largest W - beta KL over CDFs with values on a grid, by dynamic programming from atom to atom."""
    reference = np.concatenate([[0], np.cumsum(masses) / np.sum(masses)])
    grid = np.unique(np.r_[np.linspace(0, 1, 300), 0.5 ** np.arange(9, 60), 1 - 0.5 ** np.arange(9, 50), reference])
    mass = grid[None, :] - grid[:, None]
    best = np.where(grid == 0, 0.0, -np.inf)
    for atom, share in enumerate(masses):
        value = -beta * np.where(mass > 0, mass * np.log(np.maximum(mass, 1e-300) / share), 0)
        for weight, a, b in pairs:
            opponent = (b.cdf(reference[atom + 1]) + b.cdf(reference[atom])) / 2
            value += weight * opponent * (a.cdf(grid)[None, :] - a.cdf(grid)[:, None])
        best = np.max(best[:, None] + np.where(mass >= 0, value, -np.inf), axis=0)
    return best[-1]


def test_the_best_of_several_stationary_points():
    """Random cases without concavity, and one whose best point lies between two close crossings of the scan."""
    hard = [0.7382564820457044, 1e-4, 0.18219207371019613, 0.04937047829091785, 0.02684617623473493, 0.0032348]
    cases = [("0.3 sample + 0.7 worst_of(9)", "sample", 0.08611530929075938, np.array(hard) / sum(hard))]
    steep = [7.256e-4, 0.761708, 7.906e-5, 3.378e-5, 0.0826122, 0.1468866, 7.7356e-3, 1.87557e-4]  # several to a dip
    cases.append(("worst_of(64)", "worst_of(5)", 0.028163800673498655, np.array(steep) / sum(steep)))
    steep = [1.37836e-3, 0.623931, 0.104169, 9.69794e-3, 0.247370, 0.0133468, 1.06116e-4]
    cases.append(("worst_of(64)", "worst_of(5)", 0.0035854510956845873, np.array(steep) / sum(steep)))
    random = np.random.default_rng(1)
    procedures = ["worst_of(2)", "worst_of(16)", "kth(1, 6)", "kth(9, 12)", "0.5 worst_of(6) + 0.5 best_of(6)"]
    opponents = [None, "sample", "best_of(8)"]
    for number in range(30):
        beta = np.exp(random.uniform(np.log(5e-3), 0))
        cases.append((procedures[number % 5], opponents[number % 3], beta, random.dirichlet(np.ones(2 + number % 5))))
    for procedure, opponent, beta, masses in cases:
        form = solve(procedure, opponent, beta=beta)
        pairs = pairings(form.procedure, form.opponent)
        log_f = atom_log_density(masses[None], form)
        found = atom_win_rate(masses[None], log_f, pairs) - beta * atom_kl(masses[None], log_f)
        assert found[0] >= best_on_a_grid(masses, pairs, beta) - 1e-6


def one_by_one(masses, pairs, beta):
    """(8) for one prompt: bisection between all signs of a fine scan of the mass at the top, one after the other."""
    reference = np.minimum(np.concatenate([[0], np.cumsum(masses)]), 1)

    def shoot(top):
        log_f, cdf = [np.log(top / masses[-1])], 1 - top
        for j in range(len(masses) - 2, -1, -1):
            rise = sum(
                w * a.density(max(cdf, 0)) * (b.cdf(reference[j + 2]) - b.cdf(reference[j])) / 2 for w, a, b in pairs
            )
            log_f.insert(0, log_f[0] - rise / beta)
            cdf -= masses[j] * np.exp(log_f[0])
        return cdf, np.array(log_f)

    scan = masses[-1] + (1 - masses[-1]) * np.linspace(1e-9, 1, 1500)
    missing = np.array([shoot(top)[0] for top in scan])
    found = []
    for i in np.nonzero((missing[:-1] > 0) != (missing[1:] > 0))[0]:
        low, high = scan[i], scan[i + 1]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (shoot(middle)[0] > 0) == (missing[i] > 0) else (low, middle)
        found.append(shoot((low + high) / 2)[1])
    values = [(atom_win_rate(masses[None], f[None], pairs) - beta * atom_kl(masses[None], f[None]))[0] for f in found]
    return found[int(np.argmax(values))]


@pytest.mark.parametrize(
    ("procedure", "opponent", "beta"),
    [
        ("best_of(4)", None, 0.05),
        ("worst_of(4)", None, 0.2),
        ("worst_of(8)", "best_of(8)", 0.1),
        ("kth(3, 5)", None, 1.0),
    ],
)
def test_many_prompts_at_once_are_one_prompt_after_the_other(procedure, opponent, beta):
    form = solve(procedure, opponent, beta=beta)
    pairs = pairings(form.procedure, form.opponent)
    random = np.random.default_rng(2)
    masses = random.dirichlet(np.ones(6), size=5)
    padded = np.concatenate([np.zeros((5, 1)), masses, np.zeros((5, 2))], axis=1)
    padded[::2] = np.roll(padded[::2], 1, axis=1)
    found = atom_log_density(padded, form)
    for row, one in enumerate(masses):
        np.testing.assert_allclose(found[row][padded[row] > 0], one_by_one(one, pairs, beta), atol=1e-9)


@pytest.mark.parametrize("procedure", ["best_of(4)", "worst_of(4)", "kth(3, 5)"])
def test_many_atoms_tend_to_the_continuous_solution(procedure):
    form = solve(procedure, beta=0.2)
    errors = []
    for atoms in (50, 100, 200):
        edges = np.arange(atoms + 1) / atoms
        discrete = atom_log_density(np.ones((1, atoms)), form)[0]
        errors.append(np.max(np.abs(discrete - form.log_mean_density(edges[:-1], edges[1:]))))
    assert errors[2] < 0.02
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


@pytest.mark.parametrize("transform", ["identity", "log", "exp_tilt(10)"])
def test_other_transforms_average_over_the_interval_of_an_atom(transform):
    form = solve("best_of(4)", transform=transform, target_kl=0.4)
    log_f = atom_log_density([[3, 0, 1]], form)
    np.testing.assert_allclose(log_f[0, [0, 2]], form.log_mean_density([0, 0.75], [0.75, 1]), atol=1e-12)
    assert 0.75 * np.exp(log_f[0, 0]) + 0.25 * np.exp(log_f[0, 2]) == pytest.approx(1, abs=1e-9)


def test_padding_scale_and_repeats_do_not_matter():
    form = solve("worst_of(4)", beta=0.1)
    once = atom_log_density([[1, 2, 5]], form)[0]
    many = atom_log_density([[0, 1, 2, 5, 0], [10, 20, 50, 0, 0], [0, 1, 2, 5, 0], [4, 4, 0, 0, 0]], form)
    np.testing.assert_allclose(many[0, 1:4], once, atol=1e-12)
    np.testing.assert_allclose(many[1, :3], once, atol=1e-12)
    np.testing.assert_array_equal(many[0], many[2])
    np.testing.assert_allclose(many[3, :2], atom_log_density([[0.5, 0.5]], form)[0], atol=1e-12)


def test_a_single_level_teaches_nothing():
    np.testing.assert_allclose(atom_log_density([[7.0]], solve("best_of(4)", beta=0.1)), 0, atol=1e-14)


def test_mean_over_prompts_beats_the_untied_target():
    """Using the continuous density averaged over the atoms instead of (8) loses W - beta KL on every pass rate."""
    form = solve("best_of(8)", beta=0.1)
    pairs = pairings(parse_procedure("best_of(8)"))
    masses = np.stack([1 - np.arange(1, 10) / 10, np.arange(1, 10) / 10], axis=1)
    naive = form.log_mean_density(
        np.stack([0 * masses[:, 0], masses[:, 0]], 1), np.stack([masses[:, 0], np.ones(9)], 1)
    )
    exact = atom_log_density(masses, form)
    gain = [atom_win_rate(masses, f, pairs) - 0.1 * atom_kl(masses, f) for f in (exact, naive)]
    assert np.all(gain[0] > gain[1])


def test_tie_pattern_by_hand():
    counts, level = tie_pattern([[1.0, 0.0, 1.0, 0.0], [3.0, 1.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_array_equal(counts, [[2, 2, 0], [2, 1, 1], [4, 0, 0]])
    np.testing.assert_array_equal(level, [[1, 0, 1, 0], [2, 0, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("masses", [[[0.0, 0.0]], [[-1.0, 2.0]], [1.0, 2.0], [[np.nan, 1.0]]])
def test_impossible_masses_are_refused(masses):
    with pytest.raises(UserError, match=r"\(prompts, atoms\) expected"):
        atom_log_density(masses, solve("best_of(4)", beta=0.1))
