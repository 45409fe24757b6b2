"""`iapo transform` and `iapo frontier` from the outside, in processes of their own."""

import json
import subprocess
import sys

import pytest

from iapo.closed_form import frontier, solve


def iapo(*arguments):
    return subprocess.run([sys.executable, "-m", "iapo.cli", *arguments], capture_output=True, text=True, check=False)


def test_transform_json_has_the_closed_form():
    done = iapo(
        "transform", "best_of(4)", "--opponent", "sample", "--transform", "exp_tilt(5)", "--target-kl", "0.5", "--json"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    form = solve("best_of(4)", "sample", "exp_tilt(5)", target_kl=0.5)
    log_density = record.pop("log_density")
    assert record == {
        "procedure": "best_of(4)",
        "opponent": "sample",
        "transform": "exp_tilt(5)",
        "beta": form.beta,
        "kl": form.kl,
        "win_rate": form.win_rate,
        "log_partition": form.log_partition,
    }
    assert {"0.0", "0.1", "0.25", "0.5", "0.75", "0.9", "0.95", "0.99", "1.0"} <= set(log_density)
    for u, value in log_density.items():
        assert value == pytest.approx(float(form.log_density(float(u))), abs=1e-12)


def test_transform_prints_a_table_and_saves_a_figure(tmp_path):
    done = iapo("transform", "worst_of(4)", "--beta", "0.2", "--plot", str(tmp_path / "new" / "figure.png"))
    assert done.returncode == 0, done.stderr
    form = solve("worst_of(4)", beta=0.2)
    for number in (f"{form.kl:.6g}", f"{form.win_rate:.6f}", f"{float(form.log_density(0.25)):.4f}"):
        assert number in done.stdout
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_log_density_of_zero_is_null_in_json():
    record = json.loads(iapo("transform", "best_of(4)", "--transform", "log", "--target-kl", "1", "--json").stdout)
    assert record["log_density"]["0.0"] is None


def test_frontier_json_and_figure(tmp_path):
    figure = tmp_path / "frontier.svg"
    done = iapo(
        "frontier", "best_of(4)", "--transform", "optimal", "--transform", "log", "--json", "--plot", str(figure)
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    expected = frontier("best_of(4)", transforms=("optimal", "log"))
    assert (record["procedure"], record["opponent"]) == ("best_of(4)", "best_of(4)")
    assert record["kl"] == expected.kls.tolist()
    assert record["win_rate"] == {name: rates.tolist() for name, rates in expected.win_rates.items()}
    assert "<svg" in figure.read_text()


def test_frontier_prints_a_table():
    done = iapo("frontier", "worst_of(2)")
    assert done.returncode == 0, done.stderr
    assert "optimal" in done.stdout and "identity" in done.stdout
    assert f"{frontier('worst_of(2)').win_rates['optimal'][-1]:.4f}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transform", "best_of(4"], "character 10: expected ), found the end"),
        (["transform", "best_of(4)"], "exactly one of target_kl (nats) and beta"),
        (["transform", "best_of(4)", "--target-kl", "1", "--transform", "sqrt"], "unknown transform 'sqrt'"),
        (["transform", "best_of(4)", "--target-kl", "1", "--plot", "figure.docx"], "ending in .png, .svg or .pdf"),
        (["frontier", "best_of(4)", "--opponent", "wrst_of(2)"], "did you mean worst_of?"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message):
    done = iapo(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_public_api_is_imported_without_torch():
    code = (
        "import sys, iapo; before = set(sys.modules);"
        "assert not {'scipy', 'matplotlib', 'torch', 'pandas'} & before;"
        "from iapo import best_of, optimal_transform, frontier;"
        "assert optimal_transform(best_of(4), target_kl=0.5).win_rate > 0.87;"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import iapo

    assert all(hasattr(iapo, name) for name in iapo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = iapo.nothing
