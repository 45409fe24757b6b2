"""The whole pipeline on a tiny model through the command line, and what repeating it does."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import tiny_settings

from iapo.config import load_config
from iapo.pipeline import BEFORE_TRAINING, STAGES, share_samples, status
from iapo.store import read_manifest, read_table


@pytest.fixture(scope="module")
def finished(tmp_path_factory, letters_model, tiny_reward) -> Path:
    """The configuration of a run that `iapo run` has finished, with a reward model."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("pipeline")
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            tiny_settings(folder / "run", letters_model, reward={"model": str(tiny_reward), "function": None})
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "iapo.cli", "run", str(path)], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "run" / "report.html")
    return path


def test_every_stage_stores_what_its_module_says(finished):
    config = load_config(finished)
    run = config.run
    columns = {
        "prompts.parquet": ["prompt_id", "prompt", "split", "metadata"],
        "responses": ["prompt_id", "sample_id", "response", "token_ids", "finish_reason", "source"],
        "rewards": ["prompt_id", "sample_id", "reward"],
        "quantiles.parquet": ["prompt_id", "n", "rewards"],
        "calibrated.parquet": ["prompt_id", "sample_id", "calibrated_reward", "tie_low", "tie_high", "samples"],
        "ref_logprobs": ["prompt_id", "sample_id", "ref_logprob", "n_tokens"],
    }
    for name, expected in columns.items():
        assert read_table(run / name).column_names == expected
    responses = read_table(run / "responses").to_pandas()
    assert not responses.duplicated(["prompt_id", "sample_id"]).any() and len(responses) == 320
    for name in ("rewards", "calibrated.parquet", "ref_logprobs"):
        table = read_table(run / name).to_pandas()
        assert len(table.merge(responses, on=["prompt_id", "sample_id"], validate="one_to_one")) == 320
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "report.html").stat().st_size > 10_000
    names = {record["name"] for record in json.loads((run / "evaluation" / "metrics.json").read_text())["policies"]}
    assert names == {"base", "trained"}


def test_manifests_name_versions_inputs_and_settings(finished):
    config = load_config(finished)
    for name, stage in STAGES.items():
        record = read_manifest(config.run, name)
        assert record is not None and record["stage"] == name and record["versions"]["iapo"]
        assert record["identity"]["inputs"].keys() >= set(stage.inputs)
        assert record["outputs"]
    assert json.loads((config.run / "config.json").read_text())["model"]["base"] == config.model.base


def test_status_says_done(finished, iapo):
    outcome = iapo("status", finished)
    assert outcome.code == 0
    assert [line.split()[:2] for line in outcome.out.splitlines()[1:]] == [[name, "done"] for name in STAGES]


def test_repeating_does_nothing(finished, iapo):
    run = load_config(finished).run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for command in ("run", "prompts", "sample", "score", "calibrate", "train", "evaluate", "report"):
        outcome = iapo(command, finished)
        assert outcome.code == 0 and "done before" in outcome.out + outcome.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "override, stale",
    [
        ("prompts.holdout=5", ["prompts"]),
        ("sample.temperature=0.9", ["sample", "ref_logprobs", "evaluate"]),
        ("objective.target_kl=1.0", ["train"]),
        ("objective.procedure=worst_of(2)", ["train", "evaluate"]),
        ("train.learning_rate=0.01", ["train"]),
        ("evaluate.samples_per_prompt=8", ["evaluate"]),
        ("reward.batch_size=1", []),
        ("sample.batch_size=1", []),
        ("train.micro_batch_size=1", []),
        ("train.gradient_checkpointing=false", []),
        ("workers=ray", []),
    ],
)
def test_a_changed_setting_makes_stale_what_depends_on_it(finished, override, stale):
    found = status(load_config(finished, (override,)))
    assert [name for name, state, _ in found if state == "stale"] == stale
    for name, _, detail in found:
        assert name not in stale or override.split("=")[0].split(".")[-1] in detail


def test_another_run_starts_from_the_samples_of_one(finished, tmp_path):
    run = load_config(finished).run
    other = load_config(finished, (f"run={tmp_path / 'other'}", "objective.transform=identity"))
    stray = other.run / "responses" / "stray.parquet"
    for _ in range(2):  # the second time in place of what is there
        share_samples(run, other.run)
        assert not stray.exists()
        states = {name: state for name, state, _ in status(other)}
        assert states == {name: "done" if name in BEFORE_TRAINING else "to do" for name in STAGES}
        for name in ("prompts.parquet", "responses", "quantiles.parquet", "calibrated.parquet", "ref_logprobs"):
            assert read_table(other.run / name).equals(read_table(run / name))
        stray.write_bytes((run / "prompts.parquet").read_bytes())


def test_samples_that_were_half_copied_do_not_count_as_made(finished, tmp_path, monkeypatch):
    run = load_config(finished).run
    other = load_config(finished, (f"run={tmp_path / 'other'}",))
    share_samples(run, other.run)

    def full_disk(*arguments, **more):
        raise OSError("no space left on device")

    monkeypatch.setattr("iapo.pipeline.shutil.copytree", full_disk)
    with pytest.raises(OSError, match="no space"):
        share_samples(run, other.run)
    assert {name: state for name, state, _ in status(other)}["sample"] == "to do"


def test_the_seed_decides_everything(finished, tmp_path, tiny_reward, iapo, letters_model):
    """A second run of the same configuration in another folder has the same samples; another seed has others."""
    config = load_config(finished)
    for seed, same in ((0, True), (1, False)):
        path = tmp_path / f"{seed}.yaml"
        settings = tiny_settings(tmp_path / str(seed), letters_model, prompts={"source": config.prompts.source})
        path.write_text(yaml.safe_dump(settings | {"seed": seed}))
        assert iapo("prompts", path).code == iapo("sample", path).code == 0
        one, other = (read_table(run / "responses") for run in (config.run, tmp_path / str(seed)))
        assert one.equals(other) == same


def test_changed_files_make_stale_what_was_made_of_them(tiny_run, tiny_model, iapo, tmp_path, monkeypatch):
    """A template, the weights of a base in a folder, and who judges."""
    monkeypatch.chdir(tmp_path)
    base, template, judge = tmp_path / "base", tmp_path / "template.jinja", tmp_path / "file_judge.py"
    shutil.copytree(tiny_model, base)
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    judge.write_text("def longest(prompts, responses):\n    return [float(len(text)) for text in responses]\n")
    path = tiny_run(
        model={"base": str(base), "chat_template": str(template)},
        sample={"samples_per_prompt": 4},
        evaluate={"samples_per_prompt": 4, "judge": {"function": "file_judge:longest"}},
    )
    assert iapo("run", path).code == 0
    config = load_config(path)

    def stale() -> list[str]:
        return [name for name, state, _ in status(config) if state == "stale"]

    assert stale() == []
    judge.write_text(judge.read_text().replace("float(", "-float("))
    assert stale() == ["evaluate"]
    judge.write_text(judge.read_text().replace("-float(", "float("))
    for file in (template, base / "model.safetensors"):
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert stale() == ["sample"]  # and with new samples, all the rest
        file.write_bytes(before)


def test_a_restart_that_is_interrupted_mixes_nothing(tiny_run, iapo, tmp_path, monkeypatch):
    path = tiny_run(sample={"samples_per_prompt": 4})
    assert iapo("prompts", path).code == iapo("sample", path).code == 0
    shards = sorted((tmp_path / "run" / "responses").glob("*.parquet"))

    def interrupted(folder):
        shards[0].unlink()
        raise KeyboardInterrupt

    hotter = ("--set", "sample.temperature=2.0")
    with monkeypatch.context() as patch:
        patch.setattr("iapo.pipeline.shutil.rmtree", interrupted)
        assert iapo("sample", path, "--restart", *hotter).code == 130
    outcome = iapo("sample", path, *hotter)
    assert outcome.code == 2 and "temperature was 1.0, is now 2.0" in outcome.err
    old = [shard.read_bytes() for shard in shards[1:]]
    assert iapo("sample", path, "--restart", *hotter).code == 0
    assert all(shard.read_bytes() != before for shard, before in zip(shards[1:], old, strict=True))


def test_a_stage_that_failed_before_it_made_anything_may_be_mended(tiny_run, iapo):
    path = tiny_run(sample={"samples_per_prompt": 4})
    assert iapo("prompts", path, "--set", "prompts.source=missing.jsonl").code == 2
    assert iapo("prompts", path).code == 0
    long = ("--set", "sample.max_new_tokens=600")
    assert iapo("sample", path, *long).code == 2
    assert {name: state for name, state, _ in status(load_config(path))}["sample"] == "to do"
    assert iapo("sample", path).code == 0
    assert iapo("sample", path, *long).code == 2  # now there are samples to lose


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.procedure=best_off(4)", "best_off"),
        ("objective.transform=optimum", "optimum"),
        ("evaluate.procedures=[best_of(17)]", "best_of(17) draws 17 and there are 16 samples"),
        ("reward.function=no_such_module:f", "no module no_such_module"),
        ("prompts.holdout=1", "expected two or more"),
    ],
)
def test_a_run_refuses_at_once_what_only_its_last_stages_would_meet(tiny_run, iapo, tmp_path, override, words):
    outcome = iapo("run", tiny_run(), "--set", override)
    assert outcome.code == 2 and words in outcome.err
    assert not (tmp_path / "run" / "prompts.parquet").exists()
