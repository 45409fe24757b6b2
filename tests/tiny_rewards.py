"""Reward functions for tests, each named as tiny_rewards:NAME in a configuration."""


def average_byte(prompts, responses):
    """Something that a next-token model can learn and that rarely ties."""
    texts = [response.encode() for response in responses]
    return [sum(text) / len(text) + 0.001 * len(text) if text else 0.0 for text in texts]


def constant(prompts, responses):
    return [1.0] * len(responses)


def one_too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)


def nan_once(prompts, responses):
    return [float("nan")] + [1.0] * (len(responses) - 1)


def infinite(prompts, responses):
    return [float("-inf")] * len(responses)


def raises(prompts, responses):
    return [{}["no such key"] for _ in responses]


def nothing(prompts, responses):
    return None


def text(prompts, responses):
    return ["good" for _ in responses]


def known_answer(prompts, responses, metadata):
    """Reward 1 for the length that the prompt's metadata asks for."""
    return [float(len(response) == int(of["wanted"])) for response, of in zip(responses, metadata, strict=True)]


not_a_function = 3


def ends_early(prompts, responses):
    """Binary, so that rewards tie."""
    return [float(len(response) < 4) for response in responses]


def begins_with_ascii(prompts, responses):
    """Binary, and both values are common."""
    return [float(response[:1].isascii()) for response in responses]


def only_name(prompts, responses):
    """Different rewards for the prompts that start with `name` alone."""
    return [
        number * prompt[-1]["content"].startswith("name")
        for number, (prompt, _) in enumerate(zip(prompts, responses, strict=True))
    ]
