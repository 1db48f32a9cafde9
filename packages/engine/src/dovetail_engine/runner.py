"""Runner: turns plans into programs' arguments, and what they return into tokens."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_engine.mixers import Cache
from dovetail_engine.pages import TRASH, pages_for
from dovetail_engine.programs import Programs, bucket, buckets
from dovetail_engine.scheduler import Chunk, Plan
from dovetail_engine.scheduler import Sequence as Row
from dovetail_engine.steps import Build, DecodeBatch, PrefillBatch, Sampled, decode, prefill
from dovetail_kernels import Sampling
from dovetail_protocols import CacheSpec, FullCache, SamplingParams, TokenLogprob, WindowCache

__all__ = ["Produced", "Runner", "Sizes"]

STOPS = 8
"""Stop tokens that the device knows per row; further ones are found by the host, up to `decode_steps` tokens late."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of an engine.

    Attributes:
        rows: sequences that run at once.
        length: tokens of a prompt and its reply, at most.
        page: tokens per page.
        pages: pages of the cache, the trash page included.
        chunk: tokens of a prefill.
        chunks: sequences of a prefill.
        steps: steps of a decode.
    """

    rows: int
    length: int
    page: int
    pages: int
    chunk: int
    chunks: int
    steps: int

    @functools.cached_property
    def row_buckets(self) -> tuple[int, ...]:
        """Rows of the decode programs."""
        return buckets(1, self.rows, 4) if self.rows <= 4 else (1, *buckets(4, self.rows))

    @functools.cached_property
    def token_buckets(self) -> tuple[int, ...]:
        """Tokens of the prefill programs."""
        sizes = buckets(16, self.chunk, 4)
        return tuple(sorted({*sizes, *(self.chunk * part // 4 for part in (2, 3) if self.chunk >= 64)}))

    @functools.cached_property
    def context_buckets(self) -> tuple[int, ...]:
        """Tokens of context, whole pages."""
        sizes = buckets(256, self.length, 4)
        return tuple(pages_for(size, self.page) * self.page for size in sizes)

    def keys(self) -> list[tuple[Any, ...]]:
        """Return the keys of all programs that a plan may need."""
        prefills = [("prefill", tokens, 0) for tokens in self.token_buckets]
        if self.length > self.chunk:
            prefills += [("prefill", tokens, size) for tokens in self.token_buckets for size in self.context_buckets]
        return prefills + [("decode", rows, size) for rows in self.row_buckets for size in self.context_buckets]


class Produced(NamedTuple):
    """The tokens of one sequence that a step produced; none for a chunk that is not the sequence's last."""

    tokens: list[int]
    logprobs: list[TokenLogprob]


class Runner:
    """Holds the cache and the programs; not safe for use by several threads at once.

    Args:
        build: parameters to model.
        params: only their shapes matter here.
        sizes: of all programs.
        dtype: of the cache.

    Raises:
        ValueError: a layer needs a kind of cache that is not offered.
    """

    def __init__(self, build: Build, params: Any, sizes: Sizes, dtype: Any) -> None:
        self.sizes = sizes
        model = build(params)
        self.vocab_size: int = model.vocab_size
        self._shapes = [_cache_shapes(spec, sizes) for spec in model.cache_specs()]
        self._dtype = jnp.dtype(dtype)
        self.reset()
        self.programs = self._compile(build, params)

    def _compile(self, build: Build, params: Any) -> Programs:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, self._cache))
        programs = {"prefill": prefill, "decode": decode}
        jitted = {name: jax.jit(functools.partial(f, build), donate_argnums=1) for name, f in programs.items()}
        return Programs.compile(
            lambda name, *size: jitted[name].lower(*shapes, self._blank(name, *size)), self.sizes.keys()
        )

    def reset(self) -> None:
        """Make the cache anew (what was in it is lost)."""
        self._cache: Cache = tuple(
            tuple(jax.device_put(np.zeros(shape, self._dtype)) for shape in pair) for pair in self._shapes
        )

    def release(self) -> None:
        """Free the cache; nothing can be run any more."""
        self._cache = ()

    @property
    def broken(self) -> bool:
        """Whether a program failed after it had taken the cache; `reset` mends it."""
        return any(x.is_deleted() for x in jax.tree.leaves(self._cache))

    def run(self, params: Any, plan: Plan, sampling: Mapping[Row, "RowSampling"]) -> list[Produced]:
        """Run a plan; return one entry per sequence, in the order of ``plan.sequences``."""
        if plan.prefill:
            return self._prefill(params, plan.prefill, sampling)
        return self._decode(params, plan, sampling)

    def _call(self, params: Any, key: tuple[Any, ...], batch: Any) -> Sampled:
        self._cache, sampled = self.programs(key, params, self._cache, batch)
        return jax.device_get(sampled)

    def _prefill(self, params: Any, chunks: Sequence[Chunk], sampling: Mapping[Row, "RowSampling"]) -> list[Produced]:
        total = sum(chunk.stop - chunk.start for chunk in chunks)
        first = chunks[0]
        size = bucket(first.start, self.sizes.context_buckets) if first.start else 0
        key = ("prefill", bucket(total, self.sizes.token_buckets), size)
        batch = self._blank(*key)
        at = 0
        for row, (sequence, start, stop) in enumerate(chunks):
            part = slice(at, at + stop - start)
            batch.tokens[part] = sequence.tokens[start:stop]
            batch.segments[part] = row + 1
            batch.positions[part] = np.arange(start, stop)
            batch.pages[part] = np.asarray(sequence.pages)[batch.positions[part] // self.sizes.page]
            at += stop - start
            batch.last[row] = at - 1
        if size:
            held = first.sequence.pages[: pages_for(first.start, self.sizes.page)]
            batch.context[: len(held)] = held
        rows = [sampling[chunk.sequence] for chunk in chunks]
        _fill(batch.how, rows, [chunk.stop for chunk in chunks])
        batch = batch._replace(tops=np.bool_(any(row.tops for row in rows)))
        sampled = self._call(params, key, batch)
        return [
            _produced(sampled, i, 1, row.tops) if chunk.last else Produced([], [])
            for i, (chunk, row) in enumerate(zip(chunks, rows, strict=True))
        ]

    def _decode(self, params: Any, plan: Plan, sampling: Mapping[Row, "RowSampling"]) -> list[Produced]:
        sizes = self.sizes
        context = max(row.computed for row in plan.decode)
        key = ("decode", bucket(len(plan.decode), sizes.row_buckets), bucket(context, sizes.context_buckets))
        batch = self._blank(*key)
        rows = [sampling[sequence] for sequence in plan.decode]
        for i, (sequence, row) in enumerate(zip(plan.decode, rows, strict=True)):
            length = sequence.computed
            batch.tokens[i] = sequence.tokens[-1]
            batch.lengths[i] = length
            held = sequence.pages[: pages_for(length, sizes.page)]
            batch.context[i, : len(held)] = held
            targets = (length + np.arange(plan.steps)) // sizes.page
            own = targets < len(sequence.pages)
            batch.pages[i, : plan.steps][own] = np.asarray(sequence.pages)[targets[own]]
            batch.left[i] = sequence.limit - len(sequence.tokens)
            stops = row.stops[:STOPS]
            batch.stops[i, : len(stops)] = stops
        _fill(batch.how, rows, [len(sequence.tokens) for sequence in plan.decode])
        tops = np.bool_(any(row.tops for row in rows))
        sampled = self._call(params, key, batch._replace(steps=np.int32(plan.steps), tops=tops))
        return [
            _produced(sampled, i, min(plan.steps, sequence.limit - len(sequence.tokens)), row.tops, row.stops[:STOPS])
            for i, (sequence, row) in enumerate(zip(plan.decode, rows, strict=True))
        ]

    def _blank(self, name: str, size: int, context: int) -> Any:
        """Return a batch of nothing but padding."""
        pages = context // self.sizes.page
        if name == "prefill":
            tokens = np.zeros(size, np.int32)
            return PrefillBatch(
                tokens=tokens,
                segments=tokens.copy(),
                positions=tokens.copy(),
                pages=np.full(size, TRASH, np.int32),
                last=np.zeros(self.sizes.chunks, np.int32),
                context=np.full(pages, TRASH, np.int32) if context else None,
                tops=np.False_,
                how=_blank_sampling(self.sizes.chunks),
            )
        rows = np.zeros(size, np.int32)
        return DecodeBatch(
            tokens=rows,
            lengths=rows.copy(),
            context=np.full((size, pages), TRASH, np.int32),
            pages=np.full((size, self.sizes.steps), TRASH, np.int32),
            left=rows.copy(),
            stops=np.full((size, STOPS), -1, np.int32),
            steps=np.int32(0),
            tops=np.False_,
            how=_blank_sampling(size),
        )


@dataclasses.dataclass(frozen=True)
class RowSampling:
    """What the runner needs of a request: its parameters, the seed as 32 bits, and the ids that end it."""

    params: SamplingParams
    seed: int
    stops: tuple[int, ...]

    @property
    def tops(self) -> int:
        """How many alternatives are wanted."""
        return self.params.logprobs or 0


def _cache_shapes(spec: CacheSpec, sizes: Sizes) -> list[tuple[int, ...]]:
    if not isinstance(spec, FullCache | WindowCache):
        raise ValueError(f"the model has a layer with {type(spec).__name__}; expected FullCache or WindowCache")
    return [(sizes.pages, spec.kv_heads, sizes.page, dim) for dim in (spec.key_dim, spec.value_dim)]


def _blank_sampling(rows: int) -> Sampling:
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint32, np.int32)
    blank: list[Any] = [np.zeros(rows, dtype) for dtype in dtypes]
    return Sampling(*blank)._replace(top_p=np.ones(rows, np.float32))


def _fill(how: Sampling, rows: Sequence[RowSampling], positions: Sequence[int]) -> None:
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        params = row.params
        top_k = min(params.top_k, np.iinfo(np.int32).max)
        temperature = min(params.temperature, float(np.finfo(np.float32).max))
        values = (temperature, top_k, params.top_p, params.min_p, row.seed, position)
        for array, value in zip(how, values, strict=True):
            array[i] = value


def _produced(sampled: Sampled, row: int, count: int, tops: int, stops: Sequence[int] = ()) -> Produced:
    tokens = sampled.tokens[:count, row].tolist()
    count = next((i + 1 for i, token in enumerate(tokens) if token in stops), count)
    logprobs = []
    for step in range(count):
        ids, values = sampled.top_ids[step, row].tolist(), sampled.top_logprobs[step, row].tolist()
        others = [(i, v) for i, v in zip(ids, values, strict=True) if i != tokens[step]][:tops] if tops else []
        logprobs.append(TokenLogprob(float(sampled.logprobs[step, row]), dict(others)))
    return Produced(tokens[:count], logprobs)
