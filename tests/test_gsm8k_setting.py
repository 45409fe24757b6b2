"""The GSM8K setting of the benchmarks at toy size, and its reward, which must judge whatever a model says."""

import gzip
import importlib
import json
from pathlib import Path

import pytest

from iapo.config import make_config


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


@pytest.mark.parametrize(
    ("annotation", "right"),
    [
        ("48/2=24", True),
        ("48/2=25", False),
        ("10/3=3.33", True),  # to a cent
        ("10/3=3.3", False),
        ("3-5=-2", True),
        ("-5+6=1", True),
        ("(1+2)*3=9", True),
        ("2*.5=1", True),
        ("100-50-30-15=5", True),
        ("7=7", False),  # no sum
        ("1/0=3", False),
        ("2**3=8", False),
        ("9//2=4", False),
        ("012+1=13", False),
        ("1+1=2=2", False),
        ("((((1=1", False),
        ("1e999*0=0", False),
        ("9" * 60 + "*1=1", False),
        ("__import__('os')=1", False),
        ("1,000+1=1001", False),
        ("", False),
        ("=", False),
    ],
)
def test_what_is_right(annotation, right):
    rewards = importlib.import_module("benchmarks.gsm8k_rewards")
    assert rewards.is_right(annotation) is right


def test_rewards_by_hand():
    rewards = importlib.import_module("benchmarks.gsm8k_rewards")
    responses = ["<<48/2=24>><<48+24=72>>", "<<1+1=2>><<1+1=3>> 5 <<2*2=4>>", "<<1+1=2>><<2+", "<<<<>>", "no sums", ""]
    assert rewards.right_share([], responses) == pytest.approx([1, 2 / 3, 1, 0, 0, 0])
    assert rewards.right_count([], responses) == [2, 2, 1, 0, 0, 0]


def test_the_setting_is_made_once_and_configures_a_run(tmp_path):
    gsm8k = importlib.import_module("benchmarks.gsm8k")
    for split, numbers in (("train", range(2, 14)), ("test", range(14, 18))):
        problems = [
            {
                "question": f"Ann has {n} figs and buys 3.",
                "answer": f"Now <<{n}+3={n + 3}>>{n + 3}.\nAt 2 <<{n + 3}*2={2 * n + 6}>>\n<<9-2=7>>7\n#### 7",
            }
            for n in numbers
        ]
        wrong = {"question": "How many days?", "answer": "<<2+2=5>>5\n#### 5"}
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(problem) + "\n" for problem in [*problems, wrong])
    assert gsm8k.read_problems(tmp_path / "train.jsonl.gz")[11:] == [
        ("Ann has 13 figs and buys 3.", "<<13+3=16>><<16*2=32>><<9-2=7>>"),
        ("How many days?", ""),
    ]

    made = gsm8k.train_models(tmp_path, tmp_path / "out", epochs=1, count=40)
    about = made["reference"]
    assert about["problems"] == 12 and about["held_out_perplexity"] > 1
    assert 0 < about["mean_tokens"] <= gsm8k.LONGEST and 0 <= about["cut"] <= 1
    before = (tmp_path / "out" / "reference" / "model.safetensors").stat().st_mtime_ns
    assert gsm8k.train_models(tmp_path, tmp_path / "out", epochs=1, count=40) == made
    assert (tmp_path / "out" / "reference" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="learned from 40 drills, not 50"):
        gsm8k.train_models(tmp_path, tmp_path / "out", epochs=1, count=50)

    sections = gsm8k.sections(tmp_path, tmp_path / "out")
    config = make_config({"run": "r", "objective": {"target_kl": 0.5}, **sections})
    assert config.reward.function == "benchmarks.gsm8k_rewards:" + gsm8k.REWARD
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts.source).read_text().splitlines()]
    trained_on = {f"Ann has {n} figs and buys 3." for n in range(2, 14)}
    assert set(prompts) & trained_on == set() and len(prompts) == len(set(prompts)) == 4 + 1
