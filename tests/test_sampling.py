"""Sampling: the law of the drawn tokens, whatever the padding, the batch and the rows that have left it."""

from collections import Counter

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from scipy.stats import chisquare
from transformers import LlamaForCausalLM

from iapo.config import load_config
from iapo.engines.transformers import open_engine, sample_batch
from iapo.sample import RESPONSES, _write_given, prompt_shards
from iapo.store import make_table, read_manifest, read_table, write_table

END, PAD = 1, 0
PROMPTS = [[10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32]]  # of different lengths, so that two are padded
FALSE_ALARM = 1e-4
"""Odds that a chi-square test below fails for a correct sampler with another seed; the seed is fixed."""


@pytest.fixture(scope="module")
def model():
    """A vocabulary of 40 whose end token has a fair chance."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(vocab_size=40)).eval()


def draw(model, prompts, samples, *, seed=0, temperature=1.0, length=6, ends=frozenset({END})):
    generator = torch.Generator().manual_seed(seed)
    return sample_batch(model, prompts, samples, ends, PAD, length, temperature, generator)


@torch.inference_mode()
def next_probabilities(model, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Exact law of the token after `ids`, of one sequence without padding or cache."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    return torch.softmax(logits / temperature, -1)


def chi_square_odds(counts: Counter, probabilities: torch.Tensor, total: int) -> float:
    """p-value of observed tokens, with the rare ones (fewer than 5 expected) pooled."""
    expected = (probabilities / probabilities.sum()).numpy() * total
    common = [token for token in range(len(expected)) if expected[token] >= 5]
    seen = [counts[token] for token in common]
    return float(chisquare([*seen, total - sum(seen)], [*expected[common], total - expected[common].sum()]).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_exact_law(model, temperature):
    samples = 4000
    for prompt, group in zip(PROMPTS, draw(model, PROMPTS, samples, temperature=temperature, length=1), strict=True):
        counts = Counter(response.token_ids[0] for response in group)
        assert chi_square_odds(counts, next_probabilities(model, prompt, temperature), samples) > FALSE_ALARM


def test_later_tokens_follow_the_exact_law_given_those_before(model):
    samples = 6000
    for prompt, group in zip(PROMPTS, draw(model, PROMPTS, samples, length=3), strict=True):
        firsts = Counter(r.token_ids[0] for r in group if r.token_ids[0] != END)
        first, _ = firsts.most_common(1)[0]
        seconds = Counter(r.token_ids[1] for r in group if r.token_ids[0] == first)
        exact = next_probabilities(model, [*prompt, first])
        assert chi_square_odds(seconds, exact, seconds.total()) > FALSE_ALARM
        second = next(token for token, _ in seconds.most_common() if token != END)
        thirds = Counter(r.token_ids[2] for r in group if r.token_ids[:2] == [first, second])
        exact = next_probabilities(model, [*prompt, first, second])
        assert thirds.total() > 20 and chi_square_odds(thirds, exact, thirds.total()) > FALSE_ALARM


def greedy(model, prompt: list[int], length: int, ends=frozenset({END})) -> list[int]:
    response: list[int] = []
    while len(response) < length and not (response and response[-1] in ends):
        response.append(int(next_probabilities(model, prompt + response).argmax()))
    return response


def test_near_temperature_zero_every_row_is_the_greedy_response_of_its_prompt_alone(model):
    """Prompts from 1 to 30 tokens in one batch; their responses end at different steps, so rows leave the batch."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 40, (length,), generator=generator).tolist() for length in range(1, 31)]
    ends = frozenset({END, 5, 6, 7, 8, 9, 10, 11})
    alone = [greedy(model, prompt, 12, ends) for prompt in prompts]
    assert len({len(response) for response in alone}) >= 4
    together = draw(model, prompts, 2, temperature=1e-5, length=12, ends=ends)
    assert [[response.token_ids for response in group] for group in together] == [[one, one] for one in alone]


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7]], [[9]] * 4])
def test_ends_and_lengths(model, prompts):
    groups = draw(model, prompts, 50, length=6)
    assert [len(group) for group in groups] == [50] * len(prompts)
    reasons = Counter()
    for response in (response for group in groups for response in group):
        *inner, last = response.token_ids
        reasons[response.finish_reason] += 1
        assert END not in inner and 1 <= len(response.token_ids) <= 6
        assert response.finish_reason == ("stop" if last == END else "length")
        assert response.finish_reason == "stop" or len(response.token_ids) == 6
    assert reasons["stop"] and reasons["length"]


@pytest.mark.parametrize("room", [2, 64])
def test_a_cache_with_room_changes_no_response(model, monkeypatch, room):
    """Beside the cache that transformers has; so many rows end early that the batch shrinks more than once."""
    monkeypatch.setattr("iapo.engines.cache.ROOM", room)
    often = {"length": 20, "ends": frozenset(range(1, 7))}
    roomy = draw(model, PROMPTS, 50, **often)
    ended = [response.finish_reason == "stop" for group in roomy for response in group]
    assert sum(ended) > 0.75 * len(ended)
    monkeypatch.setattr("iapo.engines.transformers.with_room", lambda cache: cache)
    assert draw(model, PROMPTS, 50, **often) == roomy


def test_same_seed_same_responses(model):
    assert draw(model, PROMPTS, 5, seed=7) == draw(model, PROMPTS, 5, seed=7)
    assert draw(model, PROMPTS, 5, seed=7) != draw(model, PROMPTS, 5, seed=8)


@pytest.mark.parametrize("batch_size", [1, 4, 16, 1000])
def test_engine_gives_each_prompt_its_samples_in_order(model, batch_size):
    """At a temperature near zero each response tells which prompt it belongs to."""
    prompts = [[30, 31, 32], [20], [10, 11, 12, 13], [21], [35, 3]]
    counted = []
    engine = open_engine(
        model,
        end_ids=frozenset({END}),
        pad_id=PAD,
        max_new_tokens=4,
        temperature=1e-5,
        batch_size=batch_size,
        advance=counted.append,
    )
    groups = engine(prompts, 5, 0)
    assert [[r.token_ids for r in group] for group in groups] == [[greedy(model, p, 4)] * 5 for p in prompts]
    assert sum(counted) == 25 and max(counted) <= max(batch_size, 1)


def test_engine_samples_of_one_prompt_differ(model):
    engine = open_engine(model, end_ids=frozenset({END}), pad_id=PAD, max_new_tokens=6, batch_size=8)
    (group,) = engine([[20]], 40, 0)
    assert len(group) == 40 and len({tuple(response.token_ids) for response in group}) > 30


def test_shards_of_prompts():
    assert prompt_shards(range(5), 2) == {"00000": range(0, 2), "00001": range(2, 4), "00002": range(4, 5)}


def test_stage(tmp_path, tiny_run, iapo, caplog):
    """Every prompt has its samples; what does not fit the context of 128 is left out, counted and said."""
    source = tmp_path / "p.txt"
    source.write_text("\n".join([*(f"prompt {n}" for n in range(7)), "long " * 30]))
    path = tiny_run(prompts={"source": str(source), "holdout": 2})
    assert iapo("prompts", path).code == 0
    assert iapo("sample", path).code == 0
    assert "left out 1 prompts that do not fit the context" in caplog.text
    record = read_manifest(tmp_path / "run", "sample")
    assert record is not None and (record["rows"], record["prompts_too_long"]) == (7 * 16, 1)
    frame = read_table(tmp_path / "run" / "responses").to_pandas()
    assert frame.groupby("prompt_id")["sample_id"].apply(sorted).tolist() == [list(range(16))] * 7
    assert set(frame["source"]) == {"reference"}
    tokenizer = make_tokenizer()
    for row in frame.itertuples():
        text = tokenizer.decode([token for token in row.token_ids if token > 4])
        assert row.response == text
        assert (row.token_ids[-1] == 1) == (row.finish_reason == "stop")


def test_stage_keeps_given_responses_beside_the_samples(tmp_path, tiny_run, iapo):
    source = tmp_path / "p.jsonl"
    source.write_text(
        '{"prompt": "a", "chosen": "yes", "rejected": ""}\n{"prompt": "b", "chosen": "longer than six"}\n'
    )
    path = tiny_run(prompts={"source": str(source), "holdout": 1, "given_responses": True})
    assert iapo("prompts", path).code == iapo("sample", path).code == 0
    frame = read_table(tmp_path / "run" / "responses").to_pandas()
    assert (frame["source"] == "reference").sum() == 32
    given = frame[frame["source"] == "given"].set_index("response")
    longer = "longer"  # what is left of it in six tokens, and so what is rewarded
    ids = make_tokenizer()("longer than six")["input_ids"]
    assert given.loc["yes", "token_ids"].tolist() == [*make_tokenizer()("yes")["input_ids"], 1]
    assert given.loc["", "token_ids"].tolist() == [1]
    assert given["finish_reason"].to_dict() == {"yes": "stop", "": "stop", longer: "length"}
    assert given.loc[longer, "token_ids"].tolist() == ids[:6]


def test_given_responses_end_as_the_samples_do(tmp_path, tiny_run, iapo):
    """A model may end its turns with another token than its tokenizer's own."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "chosen": "yes"}\n{"prompt": "b", "chosen": "no"}\n')
    path = tiny_run(
        prompts={"source": str(tmp_path / "p.jsonl"), "holdout": 1, "given_responses": True},
        sample={"temperature": 3.0, "samples_per_prompt": 256, "max_new_tokens": 16},
    )
    assert iapo("prompts", path).code == iapo("sample", path).code == 0
    for shard in (tmp_path / "run" / "responses").glob("0*.parquet"):
        rows = read_table(shard).to_pylist()
        assert any(row["finish_reason"] == "stop" for row in rows)
        for row in rows:
            row["token_ids"] = [7 if token == 1 else token for token in row["token_ids"]]
        write_table(shard, make_table(rows, RESPONSES))
    given = read_table(_write_given(load_config(path))).to_pandas()
    tokens = [[*make_tokenizer()(text)["input_ids"], 7] for text in given["response"]]
    assert len(given) == 2 and [list(ids) for ids in given["token_ids"]] == tokens


def test_stage_refuses_when_every_prompt_is_too_long(tiny_run, iapo):
    path = tiny_run(sample={"max_new_tokens": 128})
    assert iapo("prompts", path).code == 0
    outcome = iapo("sample", path)
    assert outcome.code == 2 and "sample.max_new_tokens" in outcome.err and "Traceback" not in outcome.err
