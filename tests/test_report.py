"""The report of the demo's run: a page that stands alone, tells the stored numbers, and trusts nobody's text."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from iapo import report
from iapo.calibrate import BAD_KS, spread_ranks
from iapo.closed_form import solve
from iapo.config import make_config
from iapo.report import Results, number, percent, printable, read_results, render
from iapo.store import read_table

NBSP = "\N{NO-BREAK SPACE}"
VOID = {"meta", "br", "link", "img", "input", "hr"}
LOWERED = {"beta": 0.1, "kl": 0.4, "win_rate": 0.6, "tied_prompts": 1234}
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> \x00 \u202e & ${1}"


class Page(HTMLParser):
    """Text, start tags and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.balanced = True
        self.feed(html)
        self.close()
        self.balanced &= not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def first(self, tag: str) -> str:
        """The content of the first element of a kind."""
        inside = re.search(rf"<{tag}\b.*?>(.*?)</{tag}>", self.html, re.DOTALL)
        assert inside
        return inside[1].strip()


@pytest.fixture(scope="module")
def results(demo_run: Path) -> Results:
    return read_results(make_config(json.loads((demo_run / "config.json").read_text()) | {"run": str(demo_run)}))


@pytest.fixture(scope="module")
def html(results: Results) -> str:
    return render(results)


@pytest.fixture(scope="module")
def trained(demo_run: Path) -> dict:
    """The record of the trained policy under the objective's procedure."""
    records = json.loads((demo_run / "evaluation" / "metrics.json").read_text())["policies"]
    return next(record for record in records if record["name"] == "trained" and record["procedure"] == "best_of(4)")


def with_notes(results: Results, stage: str, **notes: object) -> Results:
    """The results with other notes in one stage's manifest."""
    return dataclasses.replace(results, manifests=results.manifests | {stage: results.manifests[stage] | notes})


def test_the_run_has_the_page(demo_run: Path, html: str):
    assert (demo_run / "report.html").read_text(encoding="utf-8") == html


def test_the_page_is_whole(html: str):
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.balanced
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert sum(tag == "svg" for tag, _ in page.tags) == 6


def test_the_page_needs_no_network_and_runs_no_script(html: str):
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value and value.startswith(("#", "data:"))
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_references_inside_figures_resolve(html: str):
    page = Page(html)
    names = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    wanted = set(re.findall(r"url\(#([^)]*)\)", html)) | set(re.findall(r'xlink:href="#([^"]*)"', html))
    assert wanted
    assert wanted <= names


def test_the_headline_tells_the_stored_numbers(html: str, trained: dict):
    sentence = Page(html).first("h1")
    assert sentence == report.headline(trained)
    assert "best_of(4)" in sentence
    for share in (trained["win_rate"], trained["win_rate_low"], trained["win_rate_high"]):
        assert f"{100 * share:.1f}{NBSP}%" in sentence
    assert f"{trained['kl']:.3f}{NBSP}nats" in sentence
    assert f"{100 * trained['kl_efficiency']:.0f}{NBSP}%" in sentence


def test_the_headline_without_an_efficiency(trained: dict):
    sentence = report.headline(trained | {"kl": 0.0, "kl_efficiency": None, "opponent": "sample"})
    assert "against sample" in sentence
    assert "too little to tell from none" in sentence


def test_a_kl_without_a_closed_form_has_dashes(results: Results, trained: dict):
    """At 30 nats the curves end before the point, and what cannot be compared is a dash."""
    far = {"kl": 30.0, "kl_se": 0.1, "closed_form_win_rate": None, "kl_efficiency": None}
    assert report.headline(trained | far).endswith(f"30.000{NBSP}nats.")
    records = [record | far if record["name"] == "trained" else record for record in results.records]
    stop = {"procedure": "early_stop(32, 0.3)", "target_kl": 0.5}
    config = make_config(results.config.model_dump(mode="json") | {"objective": stop})
    form = solve("early_stop(32, 0.3)", target_kl=0.5)
    own = [record | {"procedure": str(form.procedure), "opponent": str(form.opponent)} for record in records]
    html = render(dataclasses.replace(results, config=config, form=form, records=own))
    assert html.count("<td>–</td><td>–</td>") >= len({record["procedure"] for record in records})


def test_the_headline_of_a_loss(trained: dict):
    sentence = report.headline(trained | {"win_rate": 0.4, "kl_efficiency": -0.3, "closed_form_win_rate": 0.8})
    assert f"where 80.0{NBSP}% is possible" in sentence


def test_every_record_is_in_the_table(html: str, results: Results):
    rows = re.findall(r"<tr[^>]*><td class=\"text\">([^<]+)</td>.*?</tr>", html, re.DOTALL)
    names = [record["name"] for record in results.records]
    assert [name for name in rows if name in names] == names
    for record in results.records:
        assert f"<td>{number(record['win_rate'])}</td>" in html
        if record["name"] != "trained":
            lead = f"{number(record['lead'])} ({number(record['lead_low'])} to {number(record['lead_high'])})"
            assert f"<td>{lead}</td>" in html


def test_metrics_without_a_lead_have_a_page(results: Results):
    """Those of runs that were evaluated before there was one."""
    records = [{key: value for key, value in record.items() if "lead" not in key} for record in results.records]
    assert "trained wins more by" in render(dataclasses.replace(results, records=records))


def test_hostile_text_is_only_text(results: Results, html: str):
    samples = results.samples.assign(response=HOSTILE)
    prompts = {name: [{"role": "user", "content": HOSTILE}] for name in results.prompts}
    hostile = render(dataclasses.replace(results, samples=samples, prompts=prompts))
    before, after = Page(html), Page(hostile)
    assert after.balanced
    assert {tag for tag, _ in after.tags} == {tag for tag, _ in before.tags}
    assert "<script" not in hostile
    assert "<img" not in hostile
    assert "alert('x')" in after.text
    assert "\x00" not in hostile
    assert "\u202e" not in hostile


def test_a_hostile_policy_name_is_only_text(results: Results):
    records = [record | {"name": "<b>$x^2$"} if record["name"] == "base" else record for record in results.records]
    page = render(dataclasses.replace(results, records=records))
    assert "<b>$" not in page
    assert "&lt;b&gt;$x^2$" in page


def test_a_good_run_has_no_warnings_of_harm(results: Results):
    assert not any("harm" in warning or "not clear of" in warning for warning in report.warnings(results))


@pytest.mark.parametrize(
    ("stage", "notes", "words"),
    [
        ("train", {"does_harm": True}, "Training does harm"),
        ("calibrate", {"prompts_of_equal_rewards": 3}, "3 prompts have equal rewards"),
        ("calibrate", {"holdout_ks_distance": BAD_KS + 0.2}, "held-out reference samples are 0.300 away"),
        ("sample", {"prompts_too_long": 7}, "7 prompts are too long"),
        ("train", {"closed_form": LOWERED}, "0.500 nats were asked for. Where rewards tie"),
        ("train", {"closed_form": LOWERED}, "Most rewards tie on 1,234 training prompts"),
    ],
)
def test_a_warning_of_a_stage_is_shown(results: Results, html: str, stage: str, notes: dict, words: str):
    assert words not in html
    page = render(with_notes(results, stage, **notes))
    assert words in page
    assert 'class="warnings"' in page


def test_bad_uniformity_is_shown_wherever_it_is(results: Results, html: str):
    assert "do not hold" not in html
    page = render(dataclasses.replace(results, base_ks_distance=BAD_KS + 0.01))
    assert "fresh samples of the base are 0.110 away from uniform" in page
    assert "do not hold here" in page


def test_too_few_samples_for_the_procedure(results: Results):
    few = dataclasses.replace(results, references=dict.fromkeys(results.references, 8))
    assert any("sample.samples_per_prompt: 16 would" in warning for warning in report.warnings(few))


def test_an_unclear_win_rate_is_said_to_be_so(results: Results):
    records = [record | {"win_rate_low": 0.49} for record in results.records]
    found = report.warnings(dataclasses.replace(results, records=records))
    assert any(f"not clear of 50.0{NBSP}%" in warning for warning in found)


def test_spread_places_are_ranks_among_the_reference(results: Results, demo_run: Path):
    """The same cells as ranks taken from the rewards themselves."""
    rewards = {
        row["prompt_id"]: np.array(row["rewards"]) for row in read_table(demo_run / "quantiles.parquet").to_pylist()
    }
    places = report.spread_places(results)
    for prompt_id, rows in results.samples.groupby("prompt_id").indices.items():
        reference = rewards[str(prompt_id)]
        mine = results.samples["reward"].to_numpy()[rows]
        expected = spread_ranks(reference, mine, np.random.default_rng(0))
        assert np.abs(places[rows] - expected).max() <= 1 / (len(reference) + 1)
    assert places.min() >= 0
    assert places.max() <= 1


def test_examples_are_ranked_by_reward(results: Results):
    found = report.examples(results)
    assert len(found) == report.EXAMPLES
    for example in found:
        for answers in example["policies"].values():
            best, median, worst = (answers[rank]["reward"] for rank in ("best", "median", "worst"))
            assert best >= median >= worst
            assert {answer["sample_id"] for answer in answers.values()} <= set(
                range(report.samples_shown(results.config))
            )


def test_curves_end_beyond_every_policy(results: Results):
    main = report.objective_records(results)
    curves = report.curves(results, main)
    for kl, win_rate in curves.values():
        assert kl[-1] > max(record["kl"] for record in main)
        assert win_rate[0] == pytest.approx(0.5)
        assert (np.diff(win_rate) >= -1e-6).all()
    assert (curves["optimal"][1] >= curves["identity"][1] - 1e-4).all()


def test_numbers():
    assert number(None) == "–"
    assert number(-0.12345) == "−0.123"
    assert percent(0.655) == f"65.5{NBSP}%"
    assert percent(0.874, 0) == f"87{NBSP}%"
    assert percent(None) == "–"


def test_printable_keeps_lines_and_replaces_controls():
    assert printable("a\n\tb é 漢\u3000字 👩\u200d🔬") == "a\n\tb é 漢\u3000字 👩\u200d🔬"
    assert printable("a\x00b\u202ec\x1b[31m") == "a\ufffdb\ufffdc\ufffd[31m"
