"""Shapes and types of every annotated call are checked at run time."""

import sys
from pathlib import Path

import jaxtyping
import pytest

sys.path.insert(0, str(Path(__file__).parent))

with jaxtyping.install_import_hook(("dovetail_engine", "dovetail_kernels"), "beartype.beartype"):
    import dovetail_engine

import jax
from engine_toys import Letters, tiny

from dovetail_engine.programs import Programs
from dovetail_engine.runner import Runner

KEPT = 4  # engines whose programs are kept: XLA maps memory for each of their kernels, and Linux limits its maps


@pytest.fixture
def untyped():
    """Turn the run-time shape checks off, to see what a user without them sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def compiled():
    """Programs that were compiled lately, by what they were compiled for."""
    return {}


@pytest.fixture
def make_engine(compiled, monkeypatch):
    """Make engines of the tiny model that are closed after the test; programs of equal sizes are compiled once."""
    made, compile_all = [], Runner._compile

    def reuse(runner, build, params):
        layouts = tuple(x.format.layout for x in jax.tree.leaves(params))
        recipe = (build, runner.sizes, runner._dtype, layouts, runner._form.choices is not None)
        table = compiled.pop(recipe, None) or compile_all(runner, build, params).table
        compiled[recipe] = table
        for old in list(compiled)[:-KEPT]:
            del compiled[old]
        return Programs(dict(table))

    monkeypatch.setattr(Runner, "_compile", reuse)

    def make(build=None, params=None, *, tokenizer=None, **options):
        if build is None:
            build, params = tiny()
        options = {"max_running": 4, "max_length": 64, "chunk_tokens": 16, "decode_steps": 4, "page_size": 4} | options
        made.append(
            dovetail_engine.Engine(
                build, params, tokenizer=tokenizer or Letters(), options=dovetail_engine.EngineOptions(**options)
            )
        )
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def compilations():
    """What is compiled during a test, on any thread."""
    found = []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)
