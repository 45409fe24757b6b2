"""Train the small models that ship with iapo, from nothing but the text that exchanges.py generates.

    python data/train_bundled.py              everything, about 15 minutes of a CPU core that has bfloat16
    python data/train_bundled.py --scale 0.05 a rough version in two minutes

Writes a chat model (reference/), a reward model (reward/) and demo prompts (prompts.jsonl) into iapo/bundled/.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import exchanges as ex
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

OUT = Path(__file__).parents[1] / "iapo" / "bundled"
VOCABULARY = 2048
CONTEXT = 512
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END, PAD = "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer the user.", "You give short answers.", "You are a friend.")
# Streams of exchanges for different uses; training and held-out prompts are disjoint whatever the seed.
SEEDS = {"tokenizer": 1, "reference": 2, "reward": 3, "held_out": 4, "prompts": 5}
REFERENCE_SHAPE = {"hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 512, "num_attention_heads": 4}
REWARD_LAYERS = 2
REFERENCE_STEPS, REFERENCE_BATCH = 1600, 48  # exchanges
REWARD_STEPS, REWARD_BATCH, GROUP = 1200, 16, 4  # prompts, and responses to each of them
JUDGES = 8  # simulated judges of each pair of responses
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)

Message = dict[str, str]
Example = tuple[list[int], list[int]]  # token ids, labels


# --- Tokenizer and examples -----------------------------------------------------------------------------------------


def train_bpe() -> Tokenizer:
    """Byte-level BPE, so that any text can be encoded; nearly every word of the generator becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *ROLES.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(ex.exchanges(SEEDS["tokenizer"]), 20_000)
    tokenizer.train_from_iterator((text for e in sample for text in (e.prompt, e.response)), trainer)
    return tokenizer


def chat_tokenizer(bpe: Tokenizer, padding_side: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES.values()),
        model_max_length=CONTEXT,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Example:
    """What the chat template renders, as token ids; labels only on what the assistant says, its end included."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        turn = [*tokenizer.encode(message["content"], add_special_tokens=False), tokenizer.eos_token_id]
        ids += [tokenizer.convert_tokens_to_ids(ROLES[message["role"]]), *turn]
        labels += [-100, *(turn if message["role"] == "assistant" else [-100] * len(turn))]
    return ids, labels


def turns(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def conversations(seed: int, held_out: bool = False) -> Iterator[list[Message]]:
    """Single exchanges, with now and then a system message or a second exchange."""
    rng = random.Random(f"conversations-{seed}")
    stream = ex.exchanges(seed, held_out)
    for e in stream:
        messages = [{"role": "system", "content": rng.choice(SYSTEM_MESSAGES)}] if rng.random() < 0.05 else []
        messages += turns(e.prompt, e.response)
        if rng.random() < 0.07:
            e = next(stream)
            messages += turns(e.prompt, e.response)
        yield messages


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(examples: Iterator[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches of similar length, so that little is computed on padding: a pool of 16 batches is sorted at a time."""
    rng = random.Random(f"batches-{seed}")
    while True:
        pool = sorted(itertools.islice(examples, 16 * size), key=lambda example: len(example[0]))
        made = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(made)
        yield from made


# --- Training -------------------------------------------------------------------------------------------------------


def llama_config(tokenizer: PreTrainedTokenizerFast, **shape: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **shape,
    )


def fit(model: torch.nn.Module, losses: Iterator[Callable[[], torch.Tensor]], steps: int, rate: float) -> None:
    """AdamW with warm-up and cosine decay to zero."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    start, average = time.perf_counter(), 0.0
    model.train()
    for step, loss_of in enumerate(itertools.islice(losses, steps), start=1):
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average += (loss.item() - average) / min(step, 100)
        if step % max(1, steps // 20) == 0:
            print(f"  step {step}/{steps}  loss {average:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


def response_loss(model: LlamaForCausalLM, batch: list[Example]) -> torch.Tensor:
    """Mean negative log-likelihood of the labelled tokens; padding on the right needs no mask in a causal model."""
    ids, labels = padded([row for row, _ in batch], 0), padded([row for _, row in batch], -100)
    wanted = labels[:, 1:] != -100
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][wanted]  # logits only where there is a label
    return F.cross_entropy(model.lm_head(hidden).float(), labels[:, 1:][wanted])


def train_reference(tokenizer: PreTrainedTokenizerFast, scale: float) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config(tokenizer, **REFERENCE_SHAPE))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"reference: {model.num_parameters():,} parameters")
    examples = (encode(tokenizer, messages) for messages in conversations(SEEDS["reference"]))
    stream = batches(examples, REFERENCE_BATCH, SEEDS["reference"])

    def loss_of(batch: list[Example]) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # twice as fast where the processor has it
            return response_loss(model, batch)

    fit(model, ((lambda b=b: loss_of(b)) for b in stream), max(1, int(REFERENCE_STEPS * scale)), 3e-3)
    return model


def response_groups(
    seed: int, size: int, held_out: bool = False, odds: tuple[int, int, int] = (16, 10, 74)
) -> Iterator[tuple[str, list[str], list[float]]]:
    """A prompt, several responses to it and their hidden utilities. One response in eight is garbled, so that the
    reward model has seen broken text before it meets samples of a model."""
    rng = random.Random(f"groups-{seed}")
    for subject, prompt in ex.prompts(seed, held_out):
        made = [ex.response(rng, subject, odds) for _ in range(size)]
        made = [ex.garble(rng, *one) if rng.random() < 0.125 else one for one in made]
        yield prompt, [text for text, _ in made], [ex.utility(attributes) for _, attributes in made]


def score(model: LlamaForSequenceClassification, ids: list[list[int]]) -> torch.Tensor:
    rows = padded(ids, model.config.pad_token_id)
    return model(input_ids=rows, attention_mask=(rows != model.config.pad_token_id).long()).logits.squeeze(-1)


def pair_differences(values: torch.Tensor) -> torch.Tensor:
    """First minus second, for every pair of responses to one prompt: (prompts, responses) -> (prompts, pairs)."""
    first, second = torch.combinations(torch.arange(values.shape[1])).T
    return values[:, first] - values[:, second]


def preference_loss(rewards: torch.Tensor, prefer_first: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry; `prefer_first` is the share of the judges who prefer the first response of each pair."""
    return F.binary_cross_entropy_with_logits(pair_differences(rewards), prefer_first)


def token_scores(model: LlamaForSequenceClassification, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reward head at the last token, which is the model's reward, and its mean over the response's tokens."""
    ids, labels = (
        padded([row for row, _ in examples], model.config.pad_token_id),
        padded([r for _, r in examples], -100),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state
    scores = model.score(hidden.float()).squeeze(-1)
    last = torch.tensor([len(row) - 1 for row, _ in examples])
    answer = (labels != -100).float()
    return scores[torch.arange(len(last)), last], (scores * answer).sum(1) / answer.sum(1)


def train_reward(
    tokenizer: PreTrainedTokenizerFast, reference: LlamaForCausalLM, scale: float
) -> LlamaForSequenceClassification:
    """Starts from the embeddings and the first layers of the reference: they know already which words belong to
    which subject. From scratch, pairs alone teach tone and length, but not whether an answer fits its question."""
    config = llama_config(tokenizer, **(REFERENCE_SHAPE | {"num_hidden_layers": REWARD_LAYERS}))
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(reference.model.state_dict(), strict=False)
    print(f"reward: {model.num_parameters():,} parameters")

    def loss_of(examples: list[Example], labels: torch.Tensor) -> torch.Tensor:
        # The second term is there for its gradient: it reaches the telling words themselves from the first step on,
        # while the last token has to learn first where to look.
        last, mean = (scores.view(-1, GROUP) for scores in token_scores(model, examples))
        return preference_loss(last, labels) + preference_loss(mean, labels)

    def losses() -> Iterator[Callable[[], torch.Tensor]]:
        # Answers beside the question are made more common than in the training text: fit is the hardest to learn.
        groups = response_groups(SEEDS["reward"], GROUP, odds=(35, 15, 50))
        while True:
            batch = list(itertools.islice(groups, REWARD_BATCH))
            examples = [encode(tokenizer, turns(prompt, text)) for prompt, texts, _ in batch for text in texts]
            hidden = torch.tensor([utilities for _, _, utilities in batch])
            # Judges who prefer by the hidden utility, but not always: Bradley-Terry.
            chance = torch.sigmoid(pair_differences(hidden))
            labels = torch.binomial(torch.full_like(chance, JUDGES), chance) / JUDGES
            yield lambda examples=examples, labels=labels: loss_of(examples, labels)

    fit(model, losses(), max(1, int(REWARD_STEPS * scale)), 1e-3)
    return model


# --- Storage --------------------------------------------------------------------------------------------------------


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Float16 weights to save space; the configuration says float32, so that loading them computes in float32."""
    tokenizer.save_pretrained(folder)
    model.half().save_pretrained(folder)
    model.float()
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def demo_prompts(number: int) -> list[str]:
    """Distinct held-out prompts: no training exchange starts with any of them."""
    stream = (prompt for _, prompt in ex.prompts(SEEDS["prompts"], held_out=True))
    return list(itertools.islice(dict.fromkeys(itertools.islice(stream, 2 * number)), number))


def write_prompts(path: Path, number: int = 600) -> None:
    rows = ({"prompt": [{"role": "user", "content": prompt}]} for prompt in demo_prompts(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- Checks ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, number: int = 512) -> float:
    held_out = itertools.islice(ex.exchanges(SEEDS["held_out"], held_out=True), number)
    examples = [encode(tokenizer, turns(e.prompt, e.response)) for e in held_out]
    counts = [sum(label != -100 for label in labels) for _, labels in examples]
    total, size = 0.0, 64
    for i in range(0, number, size):
        total += response_loss(model, examples[i : i + size]).item() * sum(counts[i : i + size])
    return math.exp(total / sum(counts))


@torch.no_grad()
def pair_accuracy(model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, number: int = 1000) -> str:
    """Accuracy on Bradley-Terry labels beside what the hidden utility itself reaches on them, in expectation."""
    reached = best = agree = 0.0
    for prompt, texts, hidden in itertools.islice(response_groups(SEEDS["held_out"], 2, held_out=True), number):
        a, b = score(model, [encode(tokenizer, turns(prompt, text))[0] for text in texts]).tolist()
        p = 1 / (1 + math.exp(hidden[1] - hidden[0]))  # the probability that the first one is preferred
        reached += p if a > b else 1 - p
        best += max(p, 1 - p)
        agree += (a > b) == (p > 0.5)
    return f"{reached / number:.3f} (best possible {best / number:.3f}), in the order of utility {agree / number:.3f}"


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], each: int) -> list[str]:
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts for _ in range(each)]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=64)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def check(folder: Path, prompts: int = 50, each: int = 32) -> None:
    """Load what was written and print what one wants to know about it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "reference")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval()
    print("reward accuracy on held-out pairs:", pair_accuracy(reward, tokenizer))
    floating = AutoModelForCausalLM.from_pretrained(folder / "reference").eval()
    quantized = AutoModelForCausalLM.from_pretrained(folder / "reference", quantization_config=NF4).eval()
    for name, model in (("float32", floating), ("nf4", quantized)):
        print(f"{name}: held-out perplexity {perplexity(model, tokenizer):.3f}")
    asked = demo_prompts(prompts)
    start, per_batch, samples = time.perf_counter(), max(1, 256 // each), []
    for i in range(0, prompts, per_batch):
        samples += sample(quantized, tokenizer, asked[i : i + per_batch], each)
    print(f"nf4: {len(samples) / (time.perf_counter() - start):.0f} samples/s in batches of 256")
    rewards = []
    with torch.no_grad():
        for i in range(0, len(samples), 256):
            pairs = [(asked[j // each], samples[j]) for j in range(i, min(i + 256, len(samples)))]
            rewards.append(score(reward, [encode(tokenizer, turns(*pair))[0] for pair in pairs]))
    table = torch.cat(rewards).view(prompts, each)
    distinct = sum(len(set(samples[i * each : (i + 1) * each])) for i in range(prompts)) / len(samples)
    spread = table.std(dim=1)
    print(f"distinct samples {distinct:.1%}, distinct rewards {len(set(table.flatten().tolist())) / table.numel():.1%}")
    print(f"reward within a prompt: sd {spread.mean():.2f} ({spread.min():.2f} to {spread.max():.2f})")
    for i in range(0, min(prompts, 12)):
        print(f"\n{asked[i]}")
        order = table[i].argsort(descending=True).tolist()
        for j in (order[0], order[each // 3], order[2 * each // 3], order[-1]):
            print(f"  {table[i, j]:6.2f}  {samples[i * each + j]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of training steps")
    parser.add_argument("--only", choices=("reference", "reward", "check"), help="do one part only")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bpe = train_bpe()
    print(f"tokenizer: {bpe.get_vocab_size()} tokens")
    if args.only in (None, "reference"):
        set_seed(SEEDS["reference"])
        tokenizer = chat_tokenizer(bpe, "left")  # for generation
        save(train_reference(tokenizer, args.scale), tokenizer, args.out / "reference")
        write_prompts(args.out / "prompts.jsonl")
    if args.only in (None, "reward"):
        set_seed(SEEDS["reward"])
        tokenizer = chat_tokenizer(bpe, "right")
        reference = LlamaForCausalLM.from_pretrained(args.out / "reference")
        save(train_reward(tokenizer, reference, args.scale), tokenizer, args.out / "reward")
    if args.only in (None, "check"):
        set_seed(SEEDS["held_out"])
        check(args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
