"""Stop strings in streamed text: what is certain goes out, what may yet become a stop string is held back."""

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Finds the first stop string in text that arrives in pieces; how it is cut into pieces does not matter.

    The first is the one that ends first, and of two that end at the same character the longer one. The text that
    comes out, all pieces together, is the text before it.

    Args:
        stops: non-empty strings; none at all lets every text pass.

    Raises:
        ValueError: a stop string is empty.
        TypeError: `stops` is one string, or holds something that is no string.

    >>> stream = StopStrings(["</s>", "User:"])
    >>> stream.push("Hello <"), stream.push("/s> and"), stream.matched
    ('Hello ', '', '</s>')
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) for stop in stops):
            raise TypeError(f"stops is {stops!r}; expected a sequence of strings, such as ['User:']")
        if not all(stops):
            raise ValueError(f"stops is {list(stops)!r}; an empty stop string would stop before any text, leave it out")
        self.stops = tuple(dict.fromkeys(stops))
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text and return what is now certain; nothing once a stop string was found."""
        if self.matched is not None:
            return ""
        buffer = self._held + text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := buffer.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return buffer[:at]
        keep = self._uncertain(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """Return what is still held back: the text has ended, so that it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _uncertain(self, buffer: str) -> int:
        """Return the length of the longest tail that a stop string begins with."""
        longest = min(len(buffer), max((len(stop) - 1 for stop in self.stops), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(buffer[-length:]) for stop in self.stops):
                return length
        return 0
