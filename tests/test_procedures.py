"""Procedures: each h against its definition by enumeration, and the text form."""

from math import comb, exp, factorial, log

import numpy as np
import pytest

from iapo.errors import UserError
from iapo.procedures import (
    best_of,
    best_of_poisson,
    early_stop,
    kth,
    mixture,
    pairings,
    parse_procedure,
    sample,
    worst_of,
)

P = np.linspace(0, 1, 101)
EVERY = [
    sample(),
    best_of(1),
    best_of(4),
    worst_of(4),
    kth(3, 5),
    best_of_poisson(3),
    early_stop(4, 0.755),
    mixture((0.25, sample()), (0.75, worst_of(3))),
]


def at_least(k, n, p):
    """The chance that at least k of n samples are below the p-quantile: the k-th smallest is."""
    return sum(comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))


@pytest.mark.parametrize(("procedure", "k", "n"), [(best_of(4), 4, 4), (worst_of(4), 1, 4), (kth(3, 5), 3, 5)])
def test_order_statistics_against_enumeration_of_how_many_samples_are_below(procedure, k, n):
    np.testing.assert_allclose(procedure.cdf(P), at_least(k, n, P), atol=1e-14)


@pytest.mark.parametrize(("k", "n"), [(1, 161), (3, 5), (18, 196), (512, 1024)])
def test_the_log_survival_of_an_order_statistic_where_survival_is_no_number(k, n):
    """By the exact sum over how many of n are below p, in whole numbers; at p = 0.9999 down to e^-4,700."""
    p, parts = np.array([0.3, 0.9, 0.9999]), np.array([3000, 9000, 9999])
    exact = [sum(comb(n, j) * int(x) ** j * (10_000 - int(x)) ** (n - j) for j in range(k)) for x in parts]
    expected = [log(whole) - n * log(10_000) for whole in exact]
    np.testing.assert_allclose(kth(k, n).log_survival(p), expected, rtol=1e-11, atol=1e-11)
    assert kth(k, n).log_survival(1.0) == -np.inf


def test_best_of_poisson_is_the_average_over_the_number_of_draws():
    draws = sum(exp(-3) * 3**j / factorial(j) * best_of(j + 1).cdf(P) for j in range(60))
    np.testing.assert_allclose(best_of_poisson(3).cdf(P), draws, atol=1e-14)


def test_mixture_is_the_weighted_sum():
    both = mixture((0.25, best_of(4)), (0.75, worst_of(3)))
    np.testing.assert_allclose(both.cdf(P), 0.25 * P**4 + 0.75 * (1 - (1 - P) ** 3), atol=1e-14)


@pytest.mark.parametrize("procedure", EVERY, ids=str)
def test_density_is_the_derivative_of_the_cdf(procedure):
    p, step = np.linspace(0.01, 0.99, 99), 1e-6
    slope = (procedure.cdf(p + step) - procedure.cdf(p - step)) / (2 * step)
    np.testing.assert_allclose(procedure.density(p), slope, atol=1e-8)
    np.testing.assert_allclose(procedure.cdf([0, 1]), [0, 1], atol=1e-15)


@pytest.mark.parametrize("procedure", EVERY, ids=str)
def test_log_survival_is_that_of_the_cdf(procedure):
    p = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(np.exp(procedure.log_survival(p)), 1 - procedure.cdf(p), atol=1e-14)
    assert procedure.log_survival(1.0) == -np.inf


def test_log_survival_keeps_what_the_cdf_loses():
    assert worst_of(1024).log_survival(0.99) == pytest.approx(1024 * np.log(0.01))
    assert kth(2, 8).log_survival(1 - 1e-9) == pytest.approx(np.log(8) + 7 * np.log(1e-9))


def test_log_density_keeps_what_the_density_loses():
    assert best_of(1024).log_density(0.01) == pytest.approx(np.log(1024) + 1023 * np.log(0.01))
    assert best_of(4).log_density(0) == -np.inf
    assert worst_of(4).log_density(1) == -np.inf


@pytest.mark.parametrize("procedure", EVERY, ids=str)
def test_log_density_from_logarithms_is_the_same(procedure):
    p = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(
        procedure.log_density_of_logs(np.log(p), np.log1p(-p)), procedure.log_density(p), atol=1e-11
    )


def test_log_density_from_logarithms_keeps_what_p_loses():
    """At 1 - p = e^-100, of which p has nothing; of worst_of(n) log h' = log n + (n - 1) log(1 - p)."""
    one, far = np.array(-np.exp(-100.0)), np.array(-100.0)
    assert worst_of(4).log_density_of_logs(one, far) == pytest.approx(np.log(4) - 300)
    assert kth(2, 4).log_density_of_logs(one, far) == pytest.approx(np.log(12) - 200)
    assert best_of(4).log_density_of_logs(far, one) == pytest.approx(np.log(4) - 300)


@pytest.mark.parametrize(
    ("text", "procedure"),
    [
        ("sample", sample()),
        ("best_of(4)", best_of(4)),
        ("worst_of(4)", worst_of(4)),
        ("kth(3, 5)", kth(3, 5)),
        ("best_of_poisson(3)", best_of_poisson(3)),
        ("best_of_poisson(0.25)", best_of_poisson(0.25)),
        ("early_stop(8, 0.8)", early_stop(8, 0.8)),
        ("0.5 sample + 0.5 best_of(8)", mixture((0.5, sample()), (0.5, best_of(8)))),
    ],
)
def test_text_and_procedure_are_the_same_thing(text, procedure):
    assert parse_procedure(text) == procedure
    assert str(procedure) == text


@pytest.mark.parametrize("text", [" best_of( 4 ) ", "best_of(4.0)", "1.0 * best_of(4)"])
def test_spaces_and_number_formats_do_not_matter(text):
    assert str(parse_procedure(text)).removeprefix("1 ") == "best_of(4)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 1: expected a name, found the end"),
        ("bestof(4)", "character 1: unknown procedure 'bestof', did you mean best_of?"),
        ("best_of(4", "character 10: expected ), found the end"),
        ("best_of(4) worst_of(2)", "character 12: unexpected 'worst_of'"),
        ("best_of(4) & sample", "character 12: unexpected '&'"),
        ("best_of(x)", "character 9: expected a number, found 'x'"),
        ("best_of(0)", "character 1: best_of: n = 0 given"),
        ("best_of(1e300)", "a whole number from 1 to 65536 expected"),
        ("best_of(2.5)", "character 1: best_of: n = 2.5 given"),
        ("best_of", "character 1: best_of needs best_of(n), 0 given"),
        ("sample(3)", "character 1: sample takes no arguments, 1 given"),
        ("0.5 sample + kth(6, 5)", "character 14: kth(6, 5): k must be at most n"),
        ("0.5 sample + 0.6 best_of(8)", "the weights sum to 1.1"),
        ("0.5 sample + best_of(8)", "every term of a mixture needs a weight"),
        ("1.5 sample + -0.5 best_of(8)", "every weight must be a positive number"),
        ("best_of_poisson(-1)", "mu must be a finite number, at least 0"),
    ],
)
def test_errors_point_at_the_offending_character(text, message):
    with pytest.raises(UserError) as caught:
        parse_procedure(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixture_plays_itself_with_one_draw_and_others_with_two():
    both = mixture((0.5, sample()), (0.5, best_of(8)))
    assert pairings(both) == ((0.5, sample(), sample()), (0.5, best_of(8), best_of(8)))
    assert pairings(both, both) == pairings(both)
    assert pairings(both, worst_of(2)) == ((0.5, sample(), worst_of(2)), (0.5, best_of(8), worst_of(2)))
    assert pairings(best_of(4)) == ((1.0, best_of(4), best_of(4)),)
