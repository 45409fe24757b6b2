"""The command line: what it imports, its exit codes, and errors of one line."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from transformers import LlamaForCausalLM

from iapo.store import read_manifest, read_table

HEAVY = ("torch", "transformers", "pandas", "peft", "datasets", "bitsandbytes", "scipy", "matplotlib", "pyarrow")
COMMANDS = (
    *("demo", "init", "run", "prompts", "sample", "score", "calibrate", "train", "evaluate", "report", "status"),
    *("transform", "frontier", "estimate"),
)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom iapo.cli import main\nsys.argv = ['iapo', '--help']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]"
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(iapo, command):
    outcome = iapo(command, "--help")
    assert outcome.code == 0 and "Usage" in outcome.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nosuch"], ["nosuch", "iapo --help"]),
        (["run", "--nosuch"], ["--nosuch"]),
        (["init"], ["DIR"]),
        (["run", "nowhere.yaml"], ["nowhere.yaml", "no such file", "iapo init"]),
        (["status"], ["iapo.yaml", "iapo init"]),
        (["transform", "best_off(4)", "--target-kl", "1"], ["best_off"]),
        (["transform", "best_of(4)"], ["target_kl", "beta"]),
        (["transform", "best_of(0)", "--beta", "1"], ["best_of"]),
    ],
)
def test_mistakes_in_the_command_are_one_line(iapo, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    outcome = iapo(*arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith("iapo: ")
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.learning_rat=1", ["did you mean learning_rate"]),
        ("sample.top_p=0.9", ["top_p", "temperature"]),
        ("model.base=/nowhere/at/all", ["model.base", "/nowhere/at/all"]),
        ("model.chat_template=/nowhere.jinja", ["model.chat_template", "/nowhere.jinja"]),
    ],
)
def test_mistakes_in_the_configuration_are_one_line(iapo, tiny_run, override, words):
    path = tiny_run()
    assert iapo("prompts", path).code == 0
    outcome = iapo("sample", path, "--set", override)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("iapo: ")
    for word in words:
        assert word in last


def test_debug_shows_the_traceback_of_a_mistake(iapo, tmp_path):
    outcome = iapo("run", tmp_path / "none.yaml", "--debug")
    assert outcome.code == 2 and "Traceback" in outcome.err


def test_init_writes_a_file_that_is_read(iapo, tmp_path):
    assert iapo("init", tmp_path / "new").code == 0
    assert iapo("status", tmp_path / "new" / "iapo.yaml").code == 0
    again = iapo("init", tmp_path / "new")
    assert again.code == 2 and "there already" in again.err


@pytest.mark.parametrize(
    "stage, needed",
    [
        ("sample", "prompts"),
        ("score", "prompts"),
        ("calibrate", "prompts"),
        ("train", "prompts"),
        ("evaluate", "prompts"),
        ("report", "calibrate"),
    ],
)
def test_a_missing_earlier_stage_names_its_command(iapo, tiny_run, stage, needed):
    outcome = iapo(stage, tiny_run())
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"needs {needed}, which is to do; run `iapo {needed}`" in outcome.err


def test_training_before_calibration_names_calibrate(iapo, tiny_run):
    path = tiny_run(sample={"samples_per_prompt": 2})
    assert iapo("prompts", path).code == iapo("sample", path).code == 0
    outcome = iapo("train", path)
    assert outcome.code == 2 and "train needs calibrate, which is to do; run `iapo calibrate`" in outcome.err


def test_a_stale_stage_refuses_and_restart_redoes_it(iapo, tiny_run, tmp_path):
    path = tiny_run(sample={"samples_per_prompt": 2, "max_new_tokens": 3})
    assert iapo("prompts", path).code == iapo("sample", path).code == 0
    before = read_table(tmp_path / "run" / "responses")
    change = ("--set", "sample.max_new_tokens=4")
    outcome = iapo("sample", path, *change)
    assert outcome.code == 2 and "sample.max_new_tokens was 3, is now 4" in outcome.err
    assert "iapo sample --restart" in outcome.err
    assert "stale" in iapo("status", path, *change).out
    assert read_table(tmp_path / "run" / "responses").equals(before)  # nothing is lost by refusing
    assert iapo("sample", path, *change, "--restart").code == 0
    lengths = {len(ids) for ids in read_table(tmp_path / "run" / "responses")["token_ids"].to_pylist()}
    assert max(lengths) == 4


def test_a_changed_source_is_noticed(iapo, tiny_run, tmp_path):
    path = tiny_run()
    assert iapo("prompts", path).code == 0
    source = tmp_path / "run-prompts.txt"
    source.write_text(source.read_text() + "one more\n")
    outcome = iapo("prompts", path)
    assert outcome.code == 2 and "prompts.source has changed" in outcome.err
    assert iapo("prompts", path, "--restart").code == 0
    assert len(read_table(tmp_path / "run" / "prompts.parquet")) == 21


def test_stale_reference_log_probs_are_redone_by_train(iapo, tiny_run):
    """They are a stage of their own without a command of their own."""
    path = tiny_run()
    stages = ("prompts", "sample", "score", "calibrate", "train")
    assert [iapo(stage, path).code for stage in stages] == [0] * 5
    source = ("--set", "sample.samples_per_prompt=12")
    assert [iapo(stage, path, *source, "--restart").code for stage in stages[1:4]] == [0] * 3
    outcome = iapo("train", path, *source)
    assert outcome.code == 2 and "iapo train --restart" in outcome.err
    assert iapo("train", path, *source, "--restart").code == 0


def save_model(folder, *, chat_template: str | None, pad: bool, end: bool = True):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(chat_template)
    tokenizer.pad_token = "<pad>" if pad else None
    tokenizer.eos_token = "</s>" if end else None
    LlamaForCausalLM(tiny_config(pad_token_id=None, eos_token_id=1 if end else None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_base_without_pad_token_and_chat_template_samples_plain_prompts(iapo, tiny_run, tmp_path):
    base = save_model(tmp_path / "plain", chat_template=None, pad=False)
    path = tiny_run(model={"base": str(base)}, sample={"samples_per_prompt": 3})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score", "calibrate", "train")] == [0] * 5
    assert len(read_table(tmp_path / "run" / "responses")) == 60


def test_conversations_need_a_chat_template(iapo, tiny_run, tmp_path):
    base = save_model(tmp_path / "plain", chat_template=None, pad=True)
    talk = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"))]
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps({"messages": talk[n:]}) for n in (0, 2)))
    prompts = {"source": str(tmp_path / "talk.jsonl"), "holdout": 1}
    path = tiny_run(model={"base": str(base)}, prompts=prompts, sample={"samples_per_prompt": 2})
    assert iapo("prompts", path).code == 0
    outcome = iapo("sample", path)
    assert outcome.code == 2 and "no chat template" in outcome.err and "model.chat_template" in outcome.err
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: ")
    assert iapo("sample", path, "--restart", "--set", f"model.chat_template={template}").code == 0


def test_a_tokenizer_without_any_end_is_refused(iapo, tiny_run, tmp_path):
    base = save_model(tmp_path / "endless", chat_template=None, pad=True, end=False)
    path = tiny_run(model={"base": str(base)}, sample={"samples_per_prompt": 2})
    assert iapo("prompts", path).code == 0
    outcome = iapo("sample", path)
    assert outcome.code == 2 and "eos_token" in outcome.err


def test_a_full_disk_keeps_what_there_is(iapo, tiny_run, tmp_path, monkeypatch):
    """A failure, not a mistake: exit code 1, one line, the first shard kept and no half of the second."""
    import pyarrow.parquet as pq

    path = tiny_run(sample={"samples_per_prompt": 2})
    assert iapo("prompts", path).code == 0
    real, written = pq.write_table, []

    def full(table, file):
        if written:
            file.write(b"PAR1")
            raise OSError(28, "No space left on device")
        written.append(1)
        real(table, file)

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", full)
        outcome = iapo("sample", path)
    assert outcome.code == 1 and "No space left on device" in outcome.err and "Traceback" not in outcome.err
    assert [file.name for file in (tmp_path / "run" / "responses").iterdir()] == ["00000.parquet"]
    assert iapo("sample", path).code == 0
    record = read_manifest(tmp_path / "run", "sample")
    assert record is not None and record["rows"] == 40
