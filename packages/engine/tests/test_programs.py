"""Programs: shapes are compiled ahead or refused, nothing is compiled later, nothing is computed twice."""

import jax
import numpy as np
import pytest
from engine_toys import VOCAB, Letters, tiny
from hypothesis import given
from hypothesis import strategies as st

from dovetail_engine import EngineOptions, ShapeError, programs
from dovetail_engine.programs import bucket, buckets, check_maps
from dovetail_protocols import Request, SamplingParams


@given(st.integers(1, 50), st.integers(1, 3000), st.integers(2, 4))
def test_every_size_has_a_bucket(least, most, factor):
    """Some size between the smallest and the largest has no program, or is padded more than needed."""
    sizes = buckets(least, most, factor)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for size in range(1, most + 1, max(1, most // 50)):
        found = bucket(size, sizes)
        assert found >= size
        assert found <= max(sizes[0], size * factor)


def test_a_size_beyond_all_buckets_is_an_error():
    """A shape that was not compiled stalls the engine while it compiles."""
    with pytest.raises(ShapeError, match="size 65; the largest that was compiled is 64"):
        bucket(65, (16, 64))


def test_a_missing_program_fails_its_requests_and_names_the_shape(make_engine):
    """The error hides which shape is missing, or takes the engine down."""
    engine = make_engine()
    removed = {key: engine.programs.table.pop(key) for key in list(engine.programs) if key[0] == "mixed"}
    request = Request(prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=4))
    failed = engine.generate([request])[0]
    assert failed.finish_reason == "error"
    assert "ShapeError: no program ('mixed', 16, 0) was compiled" in failed.error
    engine.programs.table.update(removed)
    assert engine.generate([request])[0].finish_reason in ("stop", "length")


def test_too_many_memory_maps_are_an_error_before_the_compiler_dies(tmp_path, make_engine, monkeypatch):
    """An engine of many large programs ends the process with a segmentation fault and no word."""
    programs.check_maps()  # those of this process are within the limit, and where there is no Linux there is none
    programs.check_maps(tmp_path / "maps", tmp_path / "limit")
    (tmp_path / "maps").write_text("00400000-00452000 r-xp\n" * 91)
    (tmp_path / "limit").write_text("100\n")
    monkeypatch.setattr(programs, "check_maps", lambda: check_maps(tmp_path / "maps", tmp_path / "limit"))
    with pytest.raises(RuntimeError, match=r"91 memory maps, and Linux allows 100; .* vm.max_map_count=400, or"):
        make_engine(max_running=3)
    (tmp_path / "limit").write_text("102\n")
    check_maps(tmp_path / "maps", tmp_path / "limit")


def test_nothing_is_compiled_once_the_engine_is_ready(make_engine, compilations):
    """A request with unusual parameters stalls everyone while something compiles."""
    engine = make_engine(chunk_tokens=7, cache_tokens=64)
    _, params = tiny()
    newer = jax.tree.map(lambda x: x * 1.0, params)
    rng = np.random.default_rng(0)
    kinds = [
        {},
        {"temperature": 0.0},
        {"top_k": 5, "seed": 3},
        {"top_p": 0.5, "logprobs": 0},
        {"min_p": 0.2, "logprobs": 20},
        {"stop": ("AB", "C"), "stop_token_ids": tuple(range(5, 25))},
        {"ignore_eos": True, "top_k": 10**12},
    ]
    compilations.clear()
    for turn in range(3):
        requests = [
            Request(
                prompt=rng.integers(1, VOCAB, rng.integers(1, 45)).tolist(),
                sampling=SamplingParams(max_tokens=int(rng.integers(1, 20)), **kind),
            )
            for kind in kinds
        ]
        assert all(done.finish_reason in ("stop", "length") for done in engine.generate(requests))
        engine.update_params(newer, turn + 1, copy=turn % 2 == 0)
    assert not compilations
    jax.jit(lambda x: x + len(kinds))(1.0)
    assert compilations


def test_the_report_names_every_program(make_engine):
    """Nobody can see what was compiled and how long it took."""
    engine = make_engine()
    lines = engine.programs.report().splitlines()
    assert len(lines) == len(engine.programs.table) + 1
    assert all(" ".join(map(str, key)) in engine.programs.report() for key in engine.programs)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_running": 0}, "max_running=0; expected at least 1"),
        ({"chunk_tokens": -1}, "chunk_tokens=-1"),
        ({"decode_steps": 0}, "decode_steps=0"),
        ({"page_size": 0}, "page_size=0"),
        ({"max_length": 1}, "max_length=1; expected at least 2"),
        ({"max_length": 64, "cache_tokens": 63}, "cache_tokens=63; expected at least max_length=64"),
    ],
)
def test_impossible_options_are_refused(options, match):
    """An engine is made that can never serve, or fails while compiling."""
    with pytest.raises(ValueError, match=match):
        EngineOptions(**options)


def test_letters_round_trip():
    """The tests' own tokenizer is wrong."""
    assert Letters().decode(Letters().encode("ABC")) == "ABC"
