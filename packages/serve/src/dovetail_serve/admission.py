"""`Admission`: how many replies may be in flight, and when it makes sense to ask again."""

import math

from dovetail_serve.errors import ApiError

__all__ = ["Admission"]

LONGEST = 60


class Admission:
    """Counts the replies in flight, on the event loop's thread only.

    With r replies in flight that take s seconds each (a moving average), one ends every s/r seconds; that gives the
    time after which there is room again.

    >>> admission = Admission(2)
    >>> admission.enter(2)
    >>> admission.leave(2, seconds=3.0)
    >>> admission.used
    0
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._seconds = 1.0

    def enter(self, replies: int) -> None:
        """Take room for some replies.

        Raises:
            ApiError: 503 with the time to wait: there is no room now.
        """
        if self.used + replies > self.limit:
            message = f"{self.used} replies are in flight and this needs {replies}; expected at most {self.limit}"
            wait = self.wait(replies)
            raise ApiError(503, f"{message}; ask again in {wait} s", code="queue_full", retry_after=wait)
        self.used += replies

    def leave(self, replies: int, seconds: float | None = None) -> None:
        """Give room back; `seconds` is how long the replies took, if they were made."""
        self.used -= replies
        if seconds is not None:
            self._seconds += 0.2 * (seconds - self._seconds)

    def wait(self, replies: int) -> int:
        """Return the whole seconds, 1 to 60, after which there should be room for some replies."""
        missing = self.used + replies - self.limit
        return max(1, min(LONGEST, math.ceil(self._seconds * missing / max(1, self.used))))
