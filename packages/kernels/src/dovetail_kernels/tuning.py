"""Measured choices: `tune` finds them in a whole function, a `Store` keeps them, `tuned` applies them.

A choice is kept per operation, device and rounded sizes. Nothing acts outside ``with tuned(store)``; `Store.digest`
names what acted, because another configuration may sum in another order.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_kernels.operation import Call, Configured, Operation, policy
from dovetail_kernels.selection import explain
from dovetail_kernels.table import OPERATIONS

__all__ = ["Entry", "Store", "tune", "tuned"]

FORMAT = "dovetail-kernels tuning 1"
FARTHEST = 2.0
MUCH = 1 << 28
FAMILIES = {
    "hopper": ("H100", "H200", "H800", "GH200"),
    "blackwell": ("B100", "B200", "GB200"),
    "ampere": ("A100", "A800"),
}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One choice.

    Attributes:
        operation: its name.
        device: as jax names it.
        exactly: what must be equal for the choice to apply.
        sizes: what may differ, each rounded up to a power of two.
        implementation: what to run.
        config: its keywords.
        speedup: how much faster the whole function became.
    """

    operation: str
    device: str
    exactly: Mapping[str, Any]
    sizes: Mapping[str, int]
    implementation: str
    config: Mapping[str, Any]
    speedup: float

    @property
    def key(self) -> str:
        """What the choice is for."""
        return _canonical([self.operation, self.device, self.exactly, self.sizes])


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """Choices, at most one per operation, device and key.

    Attributes:
        entries: in no particular order.

    >>> Store().digest[:8]
    '4f53cda1'
    """

    entries: tuple[Entry, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the choices, for a run's fingerprint; how much faster they were measured to be is no part."""
        choices = [dataclasses.asdict(x) | {"speedup": None} for x in self._sorted()]
        return hashlib.sha256(_canonical(choices).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Compare choices."""
        return isinstance(other, Store) and self.digest == other.digest

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash(self.digest)

    def __or__(self, other: "Store") -> "Store":
        """Return the choices of both; those of `other` win."""
        return Store(tuple({entry.key: entry for entry in (*self.entries, *other.entries)}.values()))

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        content = {"format": FORMAT, "entries": [dataclasses.asdict(x) for x in self._sorted()]}
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Store":
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is not one, or names an operation, implementation or keyword that does not exist, or has a
                value that could not be used.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text())
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT!r}")
            if not isinstance(entries := content.get("entries"), list):
                raise ValueError(f"entries={entries!r}; expected a list")
            return cls(tuple(_entry(f"entries[{index}]", x) for index, x in enumerate(entries)))
        except ValueError as error:
            raise ValueError(f"{path} is not a tuning store: {error}") from error

    def __call__(self, operation: Operation, call: Call) -> tuple[Configured, str] | None:
        """Return the nearest choice for a call on this device and where it comes from, or None."""
        exactly, sizes = key(operation, call)
        here, found = device(call.platform), list[tuple[int, float, str, Entry]]()
        for entry in self.entries:
            if (
                entry.operation != operation.name
                or dict(entry.exactly) != exactly
                or entry.sizes.keys() != sizes.keys()
            ):
                continue
            away = sum(abs(math.log2(entry.sizes[name] / sizes[name])) for name in sizes)
            if away <= FARTHEST and family(entry.device) == family(here):
                found.append((int(entry.device != here), away, entry.key, entry))
        if not found:
            return None
        *_, entry = min(found, key=lambda x: x[:3])
        near = "exact" if dict(entry.sizes) == sizes else f"nearest, {dict(entry.sizes)}"
        source = f"tuned on {entry.device}, {near}"
        return Configured(entry.implementation, tuple(sorted(entry.config.items()))), source

    def _sorted(self) -> list[Entry]:
        return sorted(self.entries, key=lambda entry: entry.key)


def _entry(where: str, fields: Any) -> Entry:
    """Return an entry of a file; what would fail only once something is traced is refused here."""
    if not isinstance(fields, dict) or fields.keys() != _FIELDS.keys():
        raise ValueError(f"{where}={fields!r}; expected the fields {', '.join(_FIELDS)}")
    for name, (fits, expectation) in _FIELDS.items():
        if not fits(fields[name]):
            raise ValueError(f"{where}.{name}={fields[name]!r}; expected {expectation}")
    entry = Entry(**fields)
    operation = _named(entry.operation)
    operation.named(entry.implementation)
    (function,) = (x.function for x in operation.implementations if x.name == entry.implementation)
    keywords = [name for name, x in inspect.signature(function).parameters.items() if x.default is not x.empty]
    if not set(entry.config) <= set(keywords):
        raise ValueError(f"{where}.config={fields['config']!r}; {entry.implementation!r} has the keywords {keywords}")
    return entry


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _is_length(x: Any) -> bool:
    return type(x) is int and x > 0


def _is_setting(x: Any) -> bool:
    return (
        _is_length(x)
        or (isinstance(x, float) and 0 <= x < math.inf)
        or (isinstance(x, list) and all(map(_is_length, x)))
    )


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "operation": (_is_text, "a name"),
    "device": (_is_text, "a name"),
    "exactly": (lambda x: isinstance(x, dict), "values by name"),
    "sizes": (lambda x: isinstance(x, dict) and all(map(_is_length, x.values())), "lengths of at least 1 by name"),
    "implementation": (_is_text, "a name"),
    "config": (
        lambda x: isinstance(x, dict) and all(map(_is_setting, x.values())),
        "keywords with whole numbers of at least 1, lists of them, or fractions of at least 0",
    ),
    "speedup": (lambda x: isinstance(x, float | int) and 0 < x < math.inf, "a positive number"),
}


def _canonical(x: Any) -> str:
    return json.dumps(x, sort_keys=True, separators=(",", ":"))


def _named(name: str) -> Operation:
    found = {operation.name: operation for operation in OPERATIONS}
    if name not in found:
        raise ValueError(f"{name!r} is not an operation; expected one of {sorted(found)}")
    return found[name]


def device(platform: str) -> str:
    """Return how jax names the device of a platform, or the platform where it has none here."""
    try:
        return jax.devices(platform)[0].device_kind
    except RuntimeError:
        return platform


def family(device: str) -> str:
    """Return the family of devices that share choices."""
    return next((name for name, kinds in FAMILIES.items() if any(kind in device for kind in kinds)), device)


def key(operation: Operation, call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    """Return what must be equal, and sizes rounded up to powers of two."""
    exactly, sizes = _arrays(call) if operation.key is None else operation.key(call)
    return dict(exactly), {name: 1 << max(0, size - 1).bit_length() for name, size in sizes.items()}


def _arrays(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    """Return dtypes and flags, and the lengths of all axes."""
    exactly, sizes = dict[str, Any](), dict[str, int]()
    for name, value in call.arguments.items():
        for index, leaf in enumerate(jax.tree.leaves(value)):
            if hasattr(leaf, "shape"):
                exactly[f"{name}.{index}"] = str(leaf.dtype)
                sizes |= {f"{name}.{index}.{axis}": size for axis, size in enumerate(leaf.shape)}
            elif isinstance(leaf, (bool, int, str)):
                exactly[name] = leaf
    return exactly, sizes


@contextlib.contextmanager
def tuned(store: Store) -> Generator[None]:
    """Let a store's choices act in whatever is traced inside, after ``implementation=`` and `prefer`.

    >>> from dovetail_kernels import attention
    >>> with tuned(Store()):
    ...     print(explain(lambda q: attention(q, q, q), jnp.ones((1, 4, 1, 8)))[0].source)
    default
    """
    with policy(dataclasses.replace(policy.value, lookup=store)):
        yield


def tune(
    function: Callable[..., Any],
    *args: Any,
    store: Store | None = None,
    operations: Iterable[str] | None = None,
    repeats: int = 7,
    least: float = 1.03,
    seconds: float = math.inf,
) -> Store:
    """Try the implementations and configurations of every operation in a function, and return what was faster.

    The whole function is compiled and timed with its real arguments, each candidate in turn with the best so far, so
    that a choice counts only by what it brings there. A candidate that fails or whose results differ is refused, and
    one that needs more than four times the memory.

    Args:
        function: plain or jitted; every argument is an array or a pytree of them.
        *args: what to run it with; they are not donated.
        store: what was found before; the result contains it.
        operations: names of those to tune; default all.
        repeats: timed runs of each of the two.
        least: a candidate must be this much faster than the best so far.
        seconds: start no further candidate after this time.

    Raises:
        ValueError: an unknown operation, or `repeats` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; expected at least 1")
    wanted = None if operations is None else {_named(name).name for name in operations}
    store, begin = store or Store(), time.perf_counter()
    best = _compile(function, store, args)
    expected = best(*args)
    for candidate in _candidates(function, args, store, wanted):
        if time.perf_counter() - begin > seconds:
            _log.info("tune: stopped after %.0f s", seconds)
            break
        trial = store | Store((candidate,))
        try:
            compiled = _compile(function, trial, args)
            if _memory(compiled) > max(MUCH, 4 * _memory(best)):
                _log.info("tune: %s %s needs %d bytes", candidate.implementation, candidate.config, _memory(compiled))
                continue
            same = _close(compiled(*args), expected)
        except Exception as error:  # noqa: BLE001  out of memory, or whatever a trace of it raises: others may do
            _log.warning("tune: %s %s fails: %s", candidate.implementation, candidate.config, error)
            continue
        if not same:
            _log.warning("tune: %s %s gives other results", candidate.implementation, candidate.config)
            continue
        speedup = _speedup(best, compiled, args, repeats)
        _log.info("tune: %s: %s %s: %.2fx", candidate.operation, candidate.implementation, candidate.config, speedup)
        if speedup >= least:
            store = store | Store((dataclasses.replace(candidate, speedup=round(speedup, 3)),))
            best = compiled
    return store


def _compile(function: Callable[..., Any], store: Store, args: tuple[Any, ...]) -> Callable[..., Any]:
    with tuned(store):
        return jax.jit(function).lower(*args).compile()


def _memory(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def _candidates(
    function: Callable[..., Any], args: tuple[Any, ...], store: Store, wanted: set[str] | None
) -> Iterator[Entry]:
    with tuned(store):
        decisions = explain(function, *args)
    seen = set[str]()
    for decision in decisions:
        call, operation = decision.call, _named(decision.call.operation)
        if decision.source in ("implementation=", "prefer") or not (wanted is None or operation.name in wanted):
            continue
        for implementation in operation.implementations:
            if implementation.supports(call) is not True:
                continue
            for config in ({}, *implementation.configs(call)):
                if (implementation.name, dict(config)) == (decision.implementation.name, dict(decision.config)):
                    continue
                entry = Entry(
                    operation.name, device(call.platform), *key(operation, call), implementation.name, config, 1.0
                )
                if (mark := f"{entry.key} {implementation.name} {_canonical(config)}") not in seen:
                    seen.add(mark)
                    yield entry


def _close(got: Any, expected: Any) -> bool:
    def near(a: Any, b: Any) -> bool:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return bool(np.array_equal(a, b))
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(y)
        tolerance = 3e-2 if jnp.finfo(a.dtype).bits <= 16 else 1e-3
        bound = tolerance * max(1e-30, np.abs(y[finite]).max(initial=0))
        return bool(np.array_equal(np.isfinite(x), finite) and (np.abs(x - y)[finite] <= bound).all())

    return all(jax.tree.leaves(jax.tree.map(near, got, expected)))


def _speedup(best: Callable[..., Any], other: Callable[..., Any], args: tuple[Any, ...], repeats: int) -> float:
    times = {best: list[float](), other: list[float]()}
    for _ in range(repeats):
        for function, found in times.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*args))
            found.append(time.perf_counter() - begin)
    return min(times[best]) / min(times[other])
