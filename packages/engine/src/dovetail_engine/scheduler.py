"""Scheduler: what the next step computes. Pure Python: no device, no clock, no randomness.

A sequence is its tokens, how many of them are in the cache, its pages and, while it runs, the slot of its states. One
that lacks only its last token decodes; one that lacks more prefills. A plan has

- decode: every sequence that decodes, each for the same number of steps: one while others are to be prefilled, in the
  same pass over the weights, so that no reply stalls for longer than a chunk takes; else `decode_steps`.
- prefill: chunks of at most `chunk_tokens` tokens together. The sequence that the last one left half done comes first,
  then waiting ones in order of arrival, cut only when longer than a whole plan; a chunk that ends with the sequence's
  last token yields its next one.

Pages of a whole prompt are taken when it is admitted, further ones as a reply grows. When none are left the youngest
sequence gives its pages back and waits at the head of the queue; its tokens are computed again later.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence as Tokens
from typing import NamedTuple

from dovetail_engine.pages import PagePool, pages_for

__all__ = ["Chunk", "Plan", "Scheduler", "Sequence"]


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request as the scheduler sees it.

    Attributes:
        tokens: prompt and reply so far.
        limit: how many tokens prompt and reply may have.
        computed: how many tokens are in the cache.
        pages: where they are.
        slot: where the states of recurrent layers are; 0 while it does not run.
    """

    tokens: list[int]
    limit: int
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list[int])
    slot: int = 0

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache."""
        return len(self.tokens) - self.computed


class Chunk(NamedTuple):
    """The tokens ``[start, stop)`` of a sequence to prefill."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether the sequence's next token follows from it."""
        return self.stop == len(self.sequence.tokens)


class Plan(NamedTuple):
    """What a step computes: chunks, and sequences that grow by up to `steps` tokens each, 1 where there are chunks."""

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[Sequence, ...] = ()
    steps: int = 0

    @property
    def sequences(self) -> list[Sequence]:
        """All that take part."""
        return [*(chunk.sequence for chunk in self.prefill), *self.decode]


class Scheduler:
    """Plans steps and keeps account of sequences and pages.

    Args:
        pool: the pages.
        page_size: tokens per page.
        max_running: sequences that hold pages at once.
        chunk_tokens: tokens per plan that prefill.
        chunks: chunks per plan.
        decode_steps: tokens that a decoding sequence grows by per plan.
    """

    def __init__(
        self, pool: PagePool, *, page_size: int, max_running: int, chunk_tokens: int, chunks: int, decode_steps: int
    ) -> None:
        self.pool, self.page_size = pool, page_size
        self.max_running, self.chunk_tokens, self.chunks = max_running, chunk_tokens, chunks
        self.decode_steps = decode_steps
        self.slots = PagePool(max_running + 1)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """Return the next plan; an empty one when there is nothing to do."""
        if not self._admits():
            return Plan((), *self._decode(self.decode_steps))
        ready, steps = self._decode(1)  # first, so that they have their pages before another takes them
        return Plan(tuple(self._prefill()), ready, steps)

    def accept(self, sequence: Sequence, tokens: Tokens[int]) -> None:
        """Append the tokens that a step produced; all before the last of them are in the cache now."""
        sequence.tokens += tokens
        sequence.computed = len(sequence.tokens) - 1

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk which is not its sequence's last is in the cache now."""
        chunk.sequence.computed = chunk.stop

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or cancelled."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages and put it at the head of the queue."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.give(sequence.pages)
        self.slots.give([sequence.slot])
        sequence.pages, sequence.slot, sequence.computed = [], 0, 0

    def _decode(self, steps: int) -> tuple[tuple[Sequence, ...], int]:
        """Give each sequence pages for `steps` tokens, for one if that is too many; preempt if that is too many too.

        Returns:
            the sequences and the number of steps.
        """
        while ready := [sequence for sequence in self.running if sequence.missing == 1]:
            steps = min(steps, max(s.limit - len(s.tokens) for s in ready))
            counts = [self._lacking(s, min(len(s.tokens) + steps, s.limit) - 1) for s in ready]
            if sum(counts) <= self.pool.free:
                for sequence, count in zip(ready, counts, strict=True):
                    sequence.pages += self.pool.take(count) or []
                return tuple(ready), steps
            if steps > 1:
                steps = 1
            else:
                self.preempt(self.running[-1])
        return (), 0

    def _lacking(self, sequence: Sequence, tokens: int) -> int:
        return max(0, pages_for(tokens, self.page_size) - len(sequence.pages))

    def _prefill(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        left = self.chunk_tokens
        for sequence in [s for s in self.running if s.missing > 1]:  # at most the one that the last plan cut
            left -= self._cut(chunks, sequence, left)
        while len(chunks) < self.chunks and self._fits() and (not chunks or self.waiting[0].missing <= left):
            sequence = self.waiting.popleft()
            sequence.pages = self.pool.take(self._lacking(sequence, len(sequence.tokens))) or []
            slots = self.slots.take(1)
            assert slots, "there are as many as may run"
            sequence.slot = slots[0]
            self.running.append(sequence)
            left -= self._cut(chunks, sequence, left)
        return chunks

    def _admits(self) -> bool:
        return any(sequence.missing > 1 for sequence in self.running) or self._fits()

    def _fits(self) -> bool:
        """Whether the first waiting sequence can run; a page for each that runs stays free for it to grow into."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        need = self._lacking(self.waiting[0], len(self.waiting[0].tokens))
        return need + len(self.running) <= self.pool.free

    def _cut(self, chunks: list[Chunk], sequence: Sequence, left: int) -> int:
        """Append a sequence's next chunk; return its tokens."""
        chunks.append(Chunk(sequence, sequence.computed, min(len(sequence.tokens), sequence.computed + left)))
        return chunks[-1].stop - chunks[-1].start
