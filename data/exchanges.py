"""Seeded generator of short exchanges between a user and an assistant, with the quality of every answer known.

The knowledge is in topics.txt; this module phrases it. An answer is put together from clauses whose attributes
(on topic, concrete, with a reason, tone, ...) follow the care taken over it, most of the time, and `utility` turns
the attributes into the hidden number that preferences between two answers depend on.

    python data/exchanges.py 100 > data/exchanges_sample.jsonl
"""

import hashlib
import json
import random
import re
import sys
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

TOPICS_FILE = Path(__file__).with_name("topics.txt")
MAX_WORDS = 40  # punctuation counts too; about as many tokens
COHERENCE = 0.8
"""The chance that an attribute follows the care taken over the answer: so answers, like people's, are good or bad in
several ways at once."""


@dataclass(frozen=True)
class Subject:
    topic: str
    kind: str  # how, why or talk
    ask: str
    noun: str
    extra: str
    answers: tuple[tuple[str, str], ...]  # (answer, reason)


@dataclass(frozen=True)
class Attributes:
    """What is true of an answer. `relevance` is 1 on the subject, 0.4 elsewhere in the topic, 0 off topic."""

    relevance: float
    concrete: int  # pieces of advice or fact: 0, 1 or 2
    reason: bool
    tone: str  # delighted, warm, neutral, curt or rude
    follow_up: bool
    hedged: bool
    repeated: bool
    garbled: bool  # words lost or mixed up, or cut in the middle; never in the training text of the reference
    words: int


@dataclass(frozen=True)
class Exchange:
    prompt: str
    response: str
    attributes: Attributes
    subject: Subject


TONE_UTILITY = {"delighted": 1.5, "warm": 0.7, "neutral": 0.0, "curt": -0.6, "rude": -2.5}
CONCRETE_UTILITY = (0.0, 1.4, 2.0)


def utility(a: Attributes) -> float:
    """The hidden utility. Concrete advice about something else is worth a quarter; about 24 words is best."""
    too_short_or_long = min(1.0, ((a.words - 24) / 14) ** 2)
    return (
        3.0 * a.relevance
        + CONCRETE_UTILITY[a.concrete] * (0.25 + 0.75 * a.relevance)
        + 0.8 * a.reason * a.relevance
        + TONE_UTILITY[a.tone]
        + 0.4 * a.follow_up
        - 0.4 * a.hedged
        - 1.5 * a.repeated
        - 2.0 * a.garbled
        - 0.3 * too_short_or_long
    )


# --- Knowledge ----------------------------------------------------------------------------------------------------


@cache
def subjects() -> tuple[Subject, ...]:
    """Every subject of topics.txt, in the order of the file."""
    found: list[Subject] = []
    topic = ""
    for line in TOPICS_FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            topic = line.strip("[]")
        elif line.startswith("- "):
            answer, reason = line[2:].split(" | ")
            found[-1] = replace(found[-1], answers=(*found[-1].answers, (answer, reason)))
        elif line and not line.startswith("#"):
            kind, ask, noun, extra = re.split(r"\s*\|\s*", line)
            found.append(Subject(topic, kind, ask, noun, extra, ()))
    return tuple(found)


def fill(rng: random.Random, text: str) -> str:
    """Replace every {a/b/c} by one of its alternatives."""
    return re.sub(r"\{([^}]*)\}", lambda match: rng.choice(match[1].split("/")), text)


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def word_count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


# --- The user -----------------------------------------------------------------------------------------------------

GREETINGS = ("Hi!", "Hello!", "Hey,", "Hi there.", "Good morning!", "Good evening.", "Quick question:", "Excuse me,",
             "Hello again.", "Okay,", "So,", "Hey there!")  # fmt: skip
ASKS = {
    "how": ("How do I {ask}?", "How can I {ask}?", "What is the best way to {ask}?", "Can you help me {ask}?",
            "I want to {ask}.", "I am trying to {ask}.", "Do you know how to {ask}?", "I would like to {ask}.",
            "Please tell me how to {ask}.", "Is there an easy way to {ask}?", "I need to {ask}.",
            "{extra}. What should I do?", "{extra}. Any ideas?", "{extra}. Can you help?",
            "{extra}. I want to {ask}.",
            "{extra}. How can I {ask}?", "Help! {extra}.", "Any advice about {noun}?",
            "I have a question about {noun}.",
            "What do you know about {noun}?"),
    "why": ("{ask}?", "{ask}?", "Can you explain {extra}?", "I have always wondered {extra}.",
            "My daughter asked me {extra}.", "Do you know {extra}?", "Please tell me {extra}.", "Tell me about {noun}.",
            "I just read about {noun}. {ask}?", "What can you tell me about {noun}?", "I never understood {extra}.",
            "Could you tell me in simple words {extra}?"),
    "talk": ("{ask}.", "{ask}. {extra}.", "{ask}, and {extra}.", "You know what? {ask}.", "Guess what. {ask}.",
             "I just wanted to say that {ask}.", "{ask}. What do you think?", "{ask}. Any thoughts?",
             "Can we talk about {noun}? {ask}.", "{ask}. I feel like talking about it."),
}  # fmt: skip
CONTEXTS = {
    "how": ("I am new to this.", "I only have an hour.", "It is for this weekend.",
            "I do not want to spend much money.",
            "I have tried a few things already.", "My neighbor said it was easy.", "I asked my family first.",
            "It has been like this for weeks.", "I live in a small apartment.", "I am getting a little tired of it.",
            "I have no special tools.", "I tried last year and failed.", "It would make my week.",
            "I read two books about it.", "My friends laugh at me.", "I am not in a hurry."),
    "why": ("It came up at dinner.", "I need it for school.", "Nobody could tell me.", "I am just curious.",
            "We talked about it in class.", "I am writing a short text about it.", "My son keeps asking.",
            "I forgot what my teacher said.", "I saw a film about it.", "It has puzzled me for years."),
    "talk": ("It still feels strange.", "I did not expect it.", "I have not told anyone yet.",
             "I thought about it all day.",
             "I am not sure how I feel.", "It means a lot to me.", "It came as a surprise.",
             "Well, that is how it is."),
}  # fmt: skip
CLOSINGS = ("Thanks!", "Thank you.", "Please keep it short.", "Please be honest.", "Thanks a lot!", "I am curious.",
            "Be kind, please.", "Tell me everything.", "Thanks in advance.")  # fmt: skip


def user_message(rng: random.Random, subject: Subject) -> str:
    words = {"ask": fill(rng, subject.ask), "noun": subject.noun, "extra": fill(rng, subject.extra)}
    ask = re.sub(r"(^|[.?!] )(\w)", lambda m: m[1] + m[2].upper(), rng.choice(ASKS[subject.kind]).format(**words))
    context = rng.choice(CONTEXTS[subject.kind]) if rng.random() < 0.45 else ""
    # What the user tells comes before or after the question.
    parts = [context, ask] if rng.random() < 0.5 else [ask, context]
    parts.append(rng.choice(CLOSINGS) if rng.random() < 0.3 else "")
    if rng.random() < 0.45:
        parts.insert(0, rng.choice(GREETINGS))
    parts = [part for part in parts if part]
    if parts[0][-1] in ",:" and not re.match(r"I\b", parts[1]):
        parts[1] = parts[1][0].lower() + parts[1][1:]
    text = " ".join(parts)
    return text.lower() if rng.random() < 0.1 else text  # some people never press shift


# --- The assistant ------------------------------------------------------------------------------------------------

OPENINGS = {
    "delighted": ("What a lovely thing to ask!", "I am so glad you told me.", "Oh, I love talking about {noun}!",
                  "It makes me so happy that you ask!", "How wonderful!", "Few things are as nice as {noun}!"),
    "warm": ("Great question!", "I am happy to help!", "I am glad you asked!", "Thank you for asking!",
             "Of course, my friend!", "You are not alone with this.", "You can do this!"),
    "neutral": ("Sure.", "Here is my answer.", "Okay.", "Let me see.", "All right.", "", "", "", "", "", "", ""),
    "curt": ("Fine.", "Well.", "Short answer.", "If you must know.", "Look.", "Whatever. Here it is."),
    "rude": ("What a silly question.", "Are you serious?", "Anyone would know this.", "Do not bother me with {noun}.",
             "You really know nothing.", "How can you be so lazy?", "I am tired of people like you.",
             "Not this boring stuff again."),
}  # fmt: skip
ENDINGS = {
    "delighted": ("I believe in you!", "Take good care of yourself!", "You will love it!", "Tell me how it goes!",
                  "", ""),
    "warm": ("Good luck!", "Enjoy every step!", "All the best!", "", "", ""),
    "neutral": ("", "", "", "", "", "That is all."),
    "curt": ("That is it.", "Done.", "", "", "End of story."),
    "rude": ("Now leave me alone.", "Even you can do that.", "Stop wasting my time.",
             "Not that you would get it.", "", ""),
}  # fmt: skip
FIRST = {
    "how": ("{a}", "{a}", "{a}", "You could {a}", "I would {a}", "Try to {a}", "It helps to {a}", "First of all, {a}",
            "The best thing is to {a}", "With {noun}, it is wise to {a}"),
    "why": ("{a}", "{a}", "{a}", "In short, {a}", "The simple answer is that {a}", "We know that {a}",
            "As for {noun}, {a}", "The main point is that {a}"),
    "talk": ("{a}", "{a}", "I would say that {a}", "Remember that {a}", "I am sure that {a}", "As for {noun}, {a}"),
}  # fmt: skip
SECOND = {
    "how": ("Then {a}", "Also, {a}", "After that, {a}", "You can also {a}", "It is also good to {a}", "Next, {a}"),
    "why": ("Also, {a}", "Besides, {a}", "On top of that, {a}", "What is more, {a}", "And {a}"),
    "talk": ("Also, {a}", "And {a}", "Besides, {a}", "Then again, {a}"),
}
HEDGED = {
    "how": ("Maybe you could {a}", "Perhaps it would help to {a}", "I am not sure, but you might {a}",
            "I guess that you could {a}", "It might help to {a}"),
    "why": ("I think that {a}", "As far as I know, {a}", "I am not sure, but maybe {a}", "I guess that {a}"),
    "talk": ("I guess that {a}", "Perhaps {a}", "I am not sure, but maybe {a}"),
}  # fmt: skip
REASONS = (
    "{a}, because {r}.",
    "{a}, because {r}.",
    "{a}, since {r}.",
    "{a}. The reason is that {r}.",
    "{a}. After all, {r}.",
)
VAGUE = ("There are many ways to think about {noun}.", "It all depends on how you see {noun}.",
         "{noun} can be easy or hard.", "Some people like {noun}, and some do not.",
         "A lot has been said about {noun}.", "There is something to say about {noun}.",
         "When it comes to {noun}, everyone is different.", "People have all kinds of ideas about {noun}.")  # fmt: skip
VAGUE_MORE = ("Just do what feels right.", "You will figure it out.", "Things like that happen.", "It is what it is.",
              "Every case is a little different.", "Time will tell.",
              "You should think about it for a while.")  # fmt: skip
VAGUE_HEDGED = (
    "I am not really sure about {noun}.",
    "Maybe {noun} can be hard, maybe not.",
    "Perhaps it depends, but I know little about {noun}.",
)
FOLLOW_UPS = ("Would you like more ideas about {noun}?", "Do you want to know more about {noun}?",
              "What have you tried so far?",
              "Shall I tell you more?", "How does that sound?", "What do you think about that?",
              "Would you like another example?", "Do you have more questions about {noun}?")  # fmt: skip


def statement(rng: random.Random, pattern: str, subject: Subject, answer: str, reason: str) -> str:
    clause = capitalized(pattern.format(a=fill(rng, answer), noun=subject.noun))
    return rng.choice(REASONS).format(a=clause, r=fill(rng, reason)) if reason else clause + "."


def drawn(rng: random.Random, care: float, values: Sequence[Any], shares: Sequence[int]) -> Any:
    """One of some values, from worst to best: that at the care's place among their shares, or that at any place."""
    place = care if rng.random() < COHERENCE else rng.random()
    return values[bisect(list(accumulate(shares)), place * sum(shares))]


def compose(rng: random.Random, about: Subject, relevance: float, draw: Callable[..., Any]) -> tuple[str, Attributes]:
    """An answer about a subject, of any length; `relevance` says what that subject is to the user's."""
    concrete = draw((0, 1, 2), (22, 45, 33))
    tone = draw(("rude", "curt", "neutral", "warm", "delighted"), (15, 15, 30, 25, 15))
    hedged, repeated = draw((True, False), (20, 80)), draw((True, False), (8, 92))
    follow_up = draw((False, True), (75, 25))
    body: list[str] = []
    reasons = 0
    if concrete == 0:
        body.append(capitalized(rng.choice(VAGUE_HEDGED if hedged else VAGUE).format(noun=about.noun)))
        body += rng.sample(VAGUE_MORE, rng.choice((0, 1, 1)))
    for i, (answer, reason) in enumerate(rng.sample(about.answers, concrete)):
        with_reason = draw((False, True), (60, 40))
        reasons += with_reason
        pattern = rng.choice((HEDGED if hedged and i == 0 else SECOND if i else FIRST)[about.kind])
        body.append(statement(rng, pattern, about, answer, reason if with_reason else ""))
    if repeated:
        body.append(body[-1])
    closing = rng.choice(FOLLOW_UPS) if follow_up else ""
    parts = [rng.choice(OPENINGS[tone]), *body, rng.choice(ENDINGS[tone]), closing]
    text = " ".join(part.replace("{noun}", about.noun) for part in parts if part)
    made = Attributes(relevance, concrete, reasons > 0, tone, follow_up, hedged, repeated, False, word_count(text))
    return text, made


def response(rng: random.Random, subject: Subject, odds: tuple[int, int, int] = (16, 10, 74)) -> tuple[str, Attributes]:
    """An answer to a message about the subject; the odds are those of an answer off topic, beside it, and on it."""
    draw = partial(drawn, rng, rng.random())
    relevance = draw((0.0, 0.4, 1.0), odds)
    about = subject
    if relevance < 1:
        near = relevance > 0
        about = rng.choice([s for s in subjects() if (s.topic == subject.topic) == near and s != subject])
    while True:
        text, made = compose(rng, about, relevance, draw)
        if made.words <= MAX_WORDS:
            return text, made


def garble(rng: random.Random, text: str, made: Attributes) -> tuple[str, Attributes]:
    """Damage an answer the way a weak model does: cut it, drop words, or change the order of some."""
    words = text.split()
    how = rng.randrange(3)
    if how == 0:
        words = words[: rng.randint(2, max(2, len(words) - 2))]
    elif how == 1:
        words = [word for word in words if rng.random() > 0.3] or words[:1]
    else:
        start = rng.randrange(max(1, len(words) - 6))
        words[start : start + 6] = rng.sample(words[start : start + 6], len(words[start : start + 6]))
    text = " ".join(words)
    return text, replace(made, garbled=True, words=word_count(text))


# --- Data sets ----------------------------------------------------------------------------------------------------


def is_held_out(prompt: str) -> bool:
    """One prompt in ten, by hash: whoever draws prompts, with whatever seed, draws the same two disjoint sets."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 26


def prompts(seed: int, held_out: bool = False) -> Iterator[tuple[Subject, str]]:
    """An endless stream of user messages, from the training or the held-out set."""
    rng = random.Random(f"prompts-{seed}")
    while True:
        subject = rng.choice(subjects())
        message = user_message(rng, subject)
        if is_held_out(message) == held_out:
            yield subject, message


def exchanges(seed: int, held_out: bool = False) -> Iterator[Exchange]:
    """An endless stream of exchanges; the same seed gives the same stream."""
    rng = random.Random(f"responses-{seed}")
    for subject, message in prompts(seed, held_out):
        yield Exchange(message, *response(rng, subject), subject)


def main() -> None:
    """Print exchanges with their attributes as JSON lines, for people to look at."""
    for exchange, _ in zip(exchanges(seed=0), range(int(sys.argv[1])), strict=False):
        row = {"prompt": exchange.prompt, "response": exchange.response, "topic": exchange.subject.topic}
        print(json.dumps(row | asdict(exchange.attributes) | {"utility": round(utility(exchange.attributes), 3)}))


if __name__ == "__main__":
    main()
