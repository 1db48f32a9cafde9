"""Whether a plan continues what another one began: the past must be the same, the future may be another.

What a run may change on the way: skipped ranges, batch sizes and the stages of a mixture that begin at or after the
position, and sources that no stage before it reads.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dovetail_data import schedule, skips
from dovetail_data.skips import fields

if TYPE_CHECKING:
    from dovetail_data.planning import Plan

__all__ = ["differences"]


def differences(fingerprint: str, plan: "Plan", step: int) -> list[str]:
    """Return in which ways a plan is not the one of a fingerprint, as far as the steps before a step show it."""
    saved, present = fields(fingerprint), fields(plan.fingerprint)
    if missing := [name for name in ("skip", "batch", "data") if name not in saved]:
        return [f"the fingerprint {fingerprint!r:.200} has no {missing[0]}"]
    ranges = skips.parse(saved["skip"])
    reached = ranges.raw(step - 1) + 1 if step else 0  # in steps without skipped ranges
    found = [
        f"{name} is {saved.get(name)} there and {present.get(name)} here"
        for name in {**saved, **present}
        if name not in ("skip", "batch", "data", "mixture") and saved.get(name) != present.get(name)
    ]
    if ranges.before(reached) != plan.skips.before(reached):
        found.append(
            f"it left out the steps {ranges} and this plan leaves out {plan.skips}; ranges that begin before step "
            f"{reached} must be the same"
        )
    if schedule.parse(saved["batch"]).before(reached or 1) != plan.schedule.before(reached or 1):
        found.append(
            f"batch is {saved['batch']} there and {plan.schedule} here; stages before step {reached} must be the same"
        )
    return found + _other_data(saved, present, reached, plan.schedule.first_row(reached) * plan.seq_len)


def _other_data(saved: dict[str, str], present: dict[str, str], steps: int, tokens: int) -> list[str]:
    """Compare the sources, of mixtures those that were read, and the stages so far."""
    if "mixture" not in saved or "mixture" not in present:
        names = [name for name in ("data", "mixture") if saved.get(name) != present.get(name)]
        return [f"{name} is {saved.get(name)} there and {present.get(name)} here" for name in names]
    past, planned = (_stages(part["mixture"], steps, tokens) for part in (saved, present))
    if past != planned:
        return [
            f"mixture is {saved['mixture']} there and {present['mixture']} here; "
            f"what begins before step {steps} must be the same"
        ]
    read = {name for stage in past for name in _names(stage)}
    there, here = (dict(pair.split(":", 1) for pair in part["data"].split(",")) for part in (saved, present))
    return [
        f"data {name} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted(read)
        if there.get(name) != here.get(name)
    ]


def _stages(text: str, steps: int, tokens: int) -> list[str]:
    """Return the head of a described mixture, its limits, and its stages before a position."""
    head, *parts = text.split(";")
    position = max(steps if head.startswith("steps") else tokens, 1)
    return [head, *(part for part in parts if "<=" in part or int(part.partition(":")[0]) < position)]


def _names(stage: str) -> Iterable[str]:
    """Return the sources that a described stage reads."""
    return (share.partition("*")[2] for share in stage.partition(":")[2].split("+") if "*" in share)
