"""A run whose deployment is early_stop, from prompts to metrics: a procedure without h is trained for and measured."""

import json

import pytest

from iapo.closed_form import optimal_win_rate


def test_a_run_for_early_stop(iapo, tiny_run):
    config = tiny_run(objective={"procedure": "early_stop(4, 0.7)"}, evaluate={"procedures": []})
    done = iapo("run", config)
    assert done.code == 0, done.err
    records = json.loads((config.parent / "run" / "evaluation" / "metrics.json").read_text())["policies"]
    assert {record["procedure"] for record in records} == {"early_stop(4, 0.7)"}
    base, trained = records
    assert base["win_rate"] == pytest.approx(0.5, abs=0.15)
    assert 0 <= trained["win_rate"] <= 1
    if trained["closed_form_win_rate"] is not None:
        expected = optimal_win_rate("early_stop(4, 0.7)", None, trained["kl"])
        assert trained["closed_form_win_rate"] == pytest.approx(expected, abs=1e-9)
