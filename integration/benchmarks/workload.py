"""The requests that the serving benchmarks send, and when the replies of two systems count as the same."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

NEAR, COMPARED = 1e-3, 0.9


@dataclasses.dataclass(frozen=True)
class Job:
    """Token ids of a prompt and how many to generate."""

    prompt: list[int]
    output: int


def jobs(c: Mapping[str, Any]) -> list[Job]:
    """Draw ``c["requests"]`` of them: prompts of an eighth of ``c["prompt"]`` up to it, outputs from a quarter of
    ``c["output"]`` up to it, both uniform.
    """
    rng = random.Random(c["seed"])
    lengths = [
        (rng.randint(c["prompt"] // 8, c["prompt"]), rng.randint(c["output"] // 4, c["output"]))
        for _ in range(c["requests"])
    ]
    return [Job([rng.randrange(1, c["vocab"]) for _ in range(size)], output) for size, output in lengths]


def same_tokens(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> str | None:
    """Tell how greedy tokens differ, or None.

    Each request's are compared up to the first whose logit leads the peer's second best by less than `NEAR`; at least
    the fraction `COMPARED` of all must be compared. Both have ``tokens``, one list for each request, and the peer
    ``margins``, by how much each token leads.
    """
    pairs = list(zip(ours["tokens"], peer["tokens"], strict=False))
    if len(ours["tokens"]) != len(peer["tokens"]):
        return f"{len(ours['tokens'])} replies against {len(peer['tokens'])}"
    for number, ((a, b), margins) in enumerate(zip(pairs, peer["margins"], strict=True)):
        if len(a) != len(b):
            return f"reply {number} has {len(a)} tokens against {len(b)}"
        for place in range(comparable(margins)):
            if a[place] != b[place]:
                return (
                    f"reply {number}, token {place}: {a[place]} against {b[place]}, which leads by {margins[place]:.2g}"
                )
    share = compared(peer["margins"])
    return None if share >= COMPARED else f"only {share:.0%} of the tokens can be compared, fewer than {COMPARED:.0%}"


def comparable(margins: Sequence[float]) -> int:
    """How many tokens come before the first that another system may choose otherwise."""
    return next((place for place, margin in enumerate(margins) if not margin >= NEAR), len(margins))


def compared(margins: Sequence[Sequence[float]]) -> float:
    """The fraction of all tokens that `same_tokens` compares."""
    return sum(map(comparable, margins)) / sum(map(len, margins))


def same_texts(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> str | None:
    """Tell how replies over HTTP differ, or None: tokens as many in each, and `COMPARED` of the texts equal."""
    if ours["tokens"] != peer["tokens"]:
        return f"{ours['tokens']} tokens against {peer['tokens']}"
    equal = [a == b for a, b in zip(ours["texts"], peer["texts"], strict=True)]
    if sum(equal) >= COMPARED * len(equal):
        return None
    number = equal.index(False)
    a, b = ours["texts"][number], peer["texts"][number]
    return f"{len(equal) - sum(equal)} of {len(equal)} texts differ; number {number}: {a[:80]!r} against {b[:80]!r}"
