"""Tokens to text while they arrive: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

REPLACEMENT = "�"  # what decoders give for bytes that are not (yet) a character


@dataclass
class TextStream:
    """Text of a growing list of token ids; the pieces joined are the text of all of them.

    A character may be spread over several byte-level tokens: text is given out once it no longer
    ends in an unfinished character. Only a window of tokens is decoded again, so that the cost of
    a token does not grow with the answer; the window starts one piece early because decoders treat
    the first token of a text differently (they drop its leading space).

    Attributes:
        decode: token ids to text.
    """

    decode: Callable[[Sequence[int]], str]
    ids: list[int] = field(default_factory=list)
    window: int = 0
    given: int = 0

    def push(self, token: int) -> str:
        """Add a token; the text that is certain now, often empty."""
        self.ids.append(token)
        text = self._unseen()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self.window, self.given = self.given, len(self.ids)
        return text

    def flush(self) -> str:
        """What is left at the end, with replacement characters for what stayed unfinished."""
        text = self._unseen()
        self.window = self.given = len(self.ids)
        return text

    def _unseen(self) -> str:
        seen = self.decode(self.ids[self.window : self.given])
        return self.decode(self.ids[self.window :])[len(seen) :]


@dataclass
class StopWatch:
    """Ends a text at the first stop string, however the string is cut into pieces.

    Attributes:
        stops: strings that end the text; they are not part of it.
    """

    stops: tuple[str, ...]
    held: str = ""
    stopped: bool = False

    def push(self, text: str) -> str:
        """Add text; what cannot be part of a stop string any more. Sets `stopped`."""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)], ""
            return shown
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
