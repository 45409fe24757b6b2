"""Reading `name(number, ...)`, the notation of procedures and transforms, with errors that point at a character."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from iapo.errors import UserError

_TOKEN = re.compile(r"(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[(),+*])")


@dataclass(frozen=True)
class Token:
    kind: str  # number, name, sign or end
    text: str
    position: int


class Reader:
    """A cursor over the tokens of one line of text; `kind` says what the text is meant to be, for the errors."""

    def __init__(self, text: str, kind: str, example: str) -> None:
        self.text, self.kind, self.example = text, kind, example
        self.tokens = list(self._tokens())
        self.index = 0

    def _tokens(self) -> Iterable[Token]:
        position = 0
        operand = False  # after an operand, "+" joins two terms; elsewhere it is the sign of a number
        while position < len(self.text):
            if self.text[position].isspace():
                position += 1
                continue
            if operand and self.text[position] == "+":
                token = Token("sign", "+", position)
            else:
                match = _TOKEN.match(self.text, position)
                if match is None:
                    raise self.error(position, f"unexpected {self.text[position]!r}")
                token = Token(str(match.lastgroup), match[0], position)
            operand = token.kind in ("number", "name") or token.text == ")"
            position += len(token.text)
            yield token
        yield Token("end", "", len(self.text))

    def error(self, position: int, problem: str) -> UserError:
        return UserError(
            f"{self.kind} {self.text!r}, character {position + 1}: {problem}; write for example {self.example}"
        )

    @property
    def next(self) -> Token:
        return self.tokens[self.index]

    def take(self, kind: str, text: str | None = None) -> Token | None:
        """The next token if it is of this kind (and text), else None."""
        token = self.next
        if token.kind != kind or (text is not None and token.text != text):
            return None
        self.index += 1
        return token

    def expect(self, kind: str, text: str | None = None) -> Token:
        token = self.take(kind, text)
        if token is None:
            found = repr(self.next.text) if self.next.text else "the end"
            raise self.error(self.next.position, f"expected {text or f'a {kind}'}, found {found}")
        return token

    def end(self) -> None:
        """Nothing may follow."""
        if self.next.kind != "end":
            raise self.error(self.next.position, f"unexpected {self.next.text!r}")

    def call(self, names: Iterable[str]) -> tuple[Token, list[float]]:
        """A known name and its arguments; the parentheses may be missing when there are none."""
        name = self.expect("name")
        known = list(names)
        if name.text not in known:
            near = get_close_matches(name.text, known, 1)
            hint = f", did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise self.error(name.position, f"unknown {self.kind} {name.text!r}{hint}")
        arguments: list[float] = []
        if self.take("sign", "(") and not self.take("sign", ")"):
            arguments.append(float(self.expect("number").text))
            while self.take("sign", ","):
                arguments.append(float(self.expect("number").text))
            self.expect("sign", ")")
        return name, arguments


def number(value: float) -> str:
    """The shortest text that reads back as the same number, without a trailing .0."""
    return repr(float(value)).removesuffix(".0")
