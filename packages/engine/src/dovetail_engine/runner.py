"""Runner: turns plans into programs' arguments, and what they return into tokens."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dovetail_engine.mixers import Held
from dovetail_engine.pages import TRASH, pages_for
from dovetail_engine.programs import Programs, bucket, buckets
from dovetail_engine.scheduler import Chunk, Plan
from dovetail_engine.scheduler import Sequence as Row
from dovetail_engine.states import Pieces
from dovetail_engine.steps import Build, DecodeBatch, MixedBatch, Sampled, chosen, decode, mixed
from dovetail_kernels import Sampling
from dovetail_protocols import (
    CacheSpec,
    FullCache,
    LatentCache,
    RecurrentCache,
    SamplingParams,
    TokenLogprob,
    WindowCache,
)

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
        chunk: tokens of prompts in a mixed step.
        chunks: sequences that they are of.
        steps: steps of a decode.
        attends: some layer looks at earlier tokens; otherwise one size of context is enough.
    """

    rows: int
    length: int
    page: int
    pages: int
    chunk: int
    chunks: int
    steps: int
    attends: bool = True

    @functools.cached_property
    def row_buckets(self) -> tuple[int, ...]:
        """Rows of the decode programs: powers of two but 2, and from 16 on three quarters of the most."""
        if self.rows <= 4:
            return buckets(1, self.rows, 4)
        return tuple(sorted({1, *buckets(4, self.rows), *((self.rows * 3 // 4,) if self.rows >= 16 else ())}))

    @functools.cached_property
    def token_buckets(self) -> tuple[int, ...]:
        """Tokens of the mixed programs: 16, and eighths of the most."""
        most = self.chunk + self.rows
        part = max(16, -(-most // 8))
        return tuple(sorted({min(16, most), *range(part, most, part), most}))

    @functools.cached_property
    def continued_buckets(self) -> tuple[int, ...]:
        """The same where the first chunk continues a sequence: fewer, for all but its last chunk are full."""
        return self.token_buckets[::-3][::-1]

    @functools.cached_property
    def context_buckets(self) -> tuple[int, ...]:
        """Tokens of context, whole pages."""
        sizes = buckets(256, self.length, 4) if self.attends else (self.length,)
        return tuple(pages_for(size, self.page) * self.page for size in sizes)

    def keys(self) -> list[tuple[Any, ...]]:
        """Return the keys of all programs that a plan may need."""
        steps = [("mixed", tokens, 0) for tokens in self.token_buckets]
        if self.length > self.chunk:
            steps += [("mixed", tokens, size) for tokens in self.continued_buckets for size in self.context_buckets]
        return steps + [("decode", rows, size) for rows in self.row_buckets for size in self.context_buckets]


class Produced(NamedTuple):
    """The tokens of one sequence that a step produced; none for a chunk that is not the sequence's last."""

    tokens: list[int]
    logprobs: list[TokenLogprob]


class Runner:
    """Holds the cache and the programs; not safe for use by several threads at once.

    Args:
        build: parameters to model.
        params: only their shapes and layouts matter here.
        sizes: of all programs.
        dtype: of the cache.
        keep_experts: note which experts tokens go to.

    Raises:
        ValueError: a layer needs a kind of cache that is not offered, or there are no experts to keep.
    """

    def __init__(self, build: Build, params: Any, sizes: Sizes, dtype: Any, *, keep_experts: bool = False) -> None:
        model = build(params)
        self.vocab_size: int = model.vocab_size
        specs = model.cache_specs()
        recurs = [isinstance(spec, RecurrentCache) for spec in specs]
        self.sizes, self.recurs = dataclasses.replace(sizes, attends=not all(recurs)), any(recurs)
        self._dtype = jnp.dtype(dtype)
        self._form = Held(tuple(_cache_form(spec, sizes, self._dtype) for spec in specs))
        if keep_experts:
            self._form = self._form._replace(choices=self._choices_form(build, params))
        self.reset()
        self.programs = self._compile(build, params)

    def _choices_form(self, build: Build, params: Any) -> Any:
        batch = self._blank("mixed", self.sizes.token_buckets[0], 0)
        found = jax.eval_shape(functools.partial(chosen, build), params, self._form, batch)
        if not found:
            raise ValueError("keep_experts=True, but no layer of the model has experts; leave it out")
        shape = (self.sizes.pages, self.sizes.page, len(self._form.layers), next(iter(found.values())).shape[1])
        return jax.ShapeDtypeStruct(shape, jnp.int16)

    def experts(self, pages: Sequence[int], count: int) -> Int[np.ndarray, "layers count k"]:
        """Return the experts of a sequence's first tokens, int32 ``[layers, count, k]``, of the pages that it has."""
        size = bucket(count, self.sizes.context_buckets)
        table = np.full(size // self.sizes.page, TRASH, np.int32)
        held = pages[: len(table)]
        table[: len(held)] = held
        found = np.asarray(self.programs(("experts", 0, size), self._cache.choices, table), np.int32)
        return found.reshape(-1, *found.shape[2:])[:count].transpose(1, 0, 2)

    def _compile(self, build: Build, params: Any) -> Programs:
        shapes = (jax.tree.map(_described, params), jax.tree.map(_described, self._cache))
        programs = {"mixed": mixed, "decode": decode}
        jitted = {name: jax.jit(functools.partial(f, build), donate_argnums=1) for name, f in programs.items()}

        def lower(name: str, size: int, context: int) -> Any:
            if name == "experts":
                pages = jax.ShapeDtypeStruct((context // self.sizes.page,), jnp.int32)
                return jax.jit(lambda choices, pages: choices[pages]).lower(shapes[1].choices, pages)
            return jitted[name].lower(*shapes, self._blank(name, size, context))

        kept = [] if self._form.choices is None else [("experts", 0, size) for size in self.sizes.context_buckets]
        return Programs.compile(lower, [*self.sizes.keys(), *kept])

    def reset(self) -> None:
        """Make the cache anew (what was in it is lost)."""
        self._cache: Held = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), self._form)

    def release(self) -> None:
        """Free the cache; nothing can be run any more."""
        self._cache = Held(())

    @property
    def broken(self) -> bool:
        """Whether a program failed after it had taken the cache; `reset` mends it."""
        return any(x.is_deleted() for x in jax.tree.leaves(self._cache))

    def run(self, params: Any, plan: Plan, sampling: Mapping[Row, "RowSampling"]) -> list[Produced]:
        """Run a plan; return one entry per sequence, in the order of ``plan.sequences``."""
        rows = [sampling[sequence] for sequence in plan.sequences]
        return self._mixed(params, plan, rows) if plan.prefill else self._decode(params, plan, rows)

    def _call(self, params: Any, key: tuple[Any, ...], batch: Any) -> Sampled:
        self._cache, sampled = self.programs(key, params, self._cache, batch)
        return jax.device_get(sampled)

    def _mixed(self, params: Any, plan: Plan, rows: Sequence["RowSampling"]) -> list[Produced]:
        chunks = [*plan.prefill, *(Chunk(row, row.computed, len(row.tokens)) for row in plan.decode)]
        total = sum(chunk.stop - chunk.start for chunk in chunks)
        first = plan.prefill[0]
        size = bucket(first.start, self.sizes.context_buckets) if first.start else 0
        tokens = self.sizes.continued_buckets if size else self.sizes.token_buckets
        key = ("mixed", bucket(total, tokens), size)
        batch = self._blank(*key)
        batch = batch._replace(pieces=batch.pieces.cut(key[1], _states(plan.prefill)))
        at = 0
        for i, (sequence, start, stop) in enumerate(chunks):
            part = slice(at, at + stop - start)
            held = np.asarray(sequence.pages)
            batch.tokens[part] = sequence.tokens[start:stop]
            batch.segments[part] = i + 1
            batch.positions[part] = np.arange(start, stop)
            batch.pages[part] = held[batch.positions[part] // self.sizes.page]
            if i >= len(plan.prefill):
                batch.newest[i], batch.lengths[i] = at, stop
                batch.tables[i, : len(held)] = held
                batch.pieces.newest[i] = sequence.slot
            at += stop - start
            batch.last[i] = at - 1
        if size:
            pages = first.sequence.pages[: pages_for(first.start, self.sizes.page)]
            batch.context[: len(pages)] = pages
        _fill(batch.how, rows, [chunk.stop for chunk in chunks])
        sampled = self._call(params, key, batch._replace(tops=np.bool_(any(row.tops for row in rows))))
        return [
            _produced(sampled, i, 1, row.tops) if chunk.last else Produced([], [])
            for i, (chunk, row) in enumerate(zip(chunks, rows, strict=True))
        ]

    def _decode(self, params: Any, plan: Plan, rows: Sequence["RowSampling"]) -> list[Produced]:
        sizes = self.sizes
        context = max(row.computed for row in plan.decode)
        key = ("decode", bucket(len(plan.decode), sizes.row_buckets), bucket(context, sizes.context_buckets))
        batch = self._blank(*key)
        for i, (sequence, row) in enumerate(zip(plan.decode, rows, strict=True)):
            length = sequence.computed
            batch.tokens[i] = sequence.tokens[-1]
            batch.lengths[i], batch.slots[i] = length, sequence.slot
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
        sizes, pages = self.sizes, context // self.sizes.page
        if name == "mixed":
            tokens, rows = np.zeros(size, np.int32), np.zeros(sizes.rows, np.int32)
            return MixedBatch(
                tokens=tokens,
                segments=tokens.copy(),
                positions=tokens.copy(),
                pages=np.full(size, TRASH, np.int32),
                context=np.full(pages, TRASH, np.int32) if context else None,
                newest=np.full(sizes.rows, size, np.int32),
                tables=np.full((sizes.rows, sizes.length // sizes.page), TRASH, np.int32),
                lengths=rows,
                pieces=Pieces.blank(size, sizes.chunks, sizes.rows),
                last=rows.copy(),
                tops=np.False_,
                how=_blank_sampling(sizes.rows),
            )
        rows = np.zeros(size, np.int32)
        return DecodeBatch(
            tokens=rows,
            lengths=rows.copy(),
            context=np.full((size, pages), TRASH, np.int32),
            pages=np.full((size, sizes.steps), TRASH, np.int32),
            slots=rows.copy(),
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


def _described(x: Any) -> jax.ShapeDtypeStruct:
    """Return what a program for an array is compiled for; weights mapped from a file have its order of axes."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.format)


def _cache_form(spec: CacheSpec, sizes: Sizes, dtype: Any) -> Any:
    if isinstance(spec, RecurrentCache):
        return {name: jax.ShapeDtypeStruct((sizes.rows + 1, *shape), jnp.float32) for name, shape in spec.state}
    if isinstance(spec, LatentCache):
        heads, dims = 1, (spec.latent_dim + spec.rope_dim,)
    elif isinstance(spec, FullCache | WindowCache):
        heads, dims = spec.kv_heads, (spec.key_dim, spec.value_dim)
    else:
        kinds = "FullCache, WindowCache, LatentCache or RecurrentCache"
        raise ValueError(f"the model has a layer with {type(spec).__name__}; expected {kinds}")
    return tuple(jax.ShapeDtypeStruct((sizes.pages, heads, sizes.page, dim), dtype) for dim in dims)


def _states(chunks: Sequence[Chunk]) -> list[tuple[int, int, int, bool]]:
    """Return what `Pieces.cut` wants of chunks that stand one after the other."""
    ends = np.cumsum([chunk.stop - chunk.start for chunk in chunks]).tolist()
    return [
        (end - (chunk.stop - chunk.start), chunk.stop - chunk.start, chunk.sequence.slot, chunk.start == 0)
        for chunk, end in zip(chunks, ends, strict=True)
    ]


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
    values = sampled.logprobs[:count, row].tolist()
    others: list[dict[int, float]] = [{} for _ in values]
    if tops:
        ids, their = sampled.top_ids[:count, row].tolist(), sampled.top_logprobs[:count, row].tolist()
        for step, found in enumerate(others):
            pairs = [(i, v) for i, v in zip(ids[step], their[step], strict=True) if i != tokens[step]]
            found.update(pairs[:tops])
    return Produced(tokens[:count], [TokenLogprob(*entry) for entry in zip(values, others, strict=True)])
