"""Tuning: what is found is kept, acts only where asked, and never changes results."""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import Entry, Store, attention, causal, explain, prefer, tune, tuned, tuning
from dovetail_kernels.attention import ATTENTION
from dovetail_kernels.operation import Call, Implementation, Operation

Q = jnp.ones((1, 40, 2, 8))


def call(q: jax.Array, **options: Any) -> jax.Array:
    return attention(q, q, q, causal(), **options)


def entry(time: int = 64, device: str = "cpu", **config: Any) -> Entry:
    """A choice for `call` of rows of about `time`."""
    abstract = jax.ShapeDtypeStruct((1, time, 2, 8), jnp.float32)
    key = tuning.key(ATTENTION, explain(call, abstract)[0].call)
    return Entry("attention", device, *key, "blocked", config, 1.5)


def decided(store: Store, q: Any = Q, **options: Any) -> tuple[Any, str]:
    with tuned(store):
        (decision,) = explain(lambda q: call(q, **options), q)
    return decision.config, decision.source


def test_a_store_acts_only_inside_its_context() -> None:
    """Configurations change how sums are ordered: none may act unasked."""
    store = Store((entry(rows=16),))
    assert decided(store) == ({"rows": 16}, "tuned on cpu, exact")
    assert explain(call, Q)[0].source == "default"
    assert decided(store, implementation="reference")[1] == "implementation="
    with prefer(attention="reference"):
        assert decided(store)[1] == "prefer"
    jitted = jax.jit(call)
    before = jitted(Q)
    with tuned(store):
        np.testing.assert_allclose(jitted(Q), before, rtol=1e-6)
        assert explain(jitted, Q)[0].config == {"rows": 16}


def test_nearest_sizes_and_related_devices() -> None:
    """A new batch size finds the choice of its neighbour; another head size or device does not."""
    store = Store((entry(64, rows=16), entry(1024, rows=256)))
    assert decided(store, jnp.ones((1, 100, 2, 8)))[0] == {"rows": 16}
    assert "nearest, {'rows': 2, 'time': 64" in decided(store, jnp.ones((1, 100, 2, 8)))[1]
    assert decided(store, jnp.ones((1, 600, 2, 8)))[0] == {"rows": 256}
    for other in (jnp.ones((1, 40, 2, 16)), jnp.ones((1, 8000, 2, 8)), Q.astype(jnp.bfloat16)):
        assert decided(store, other)[1] == "default"
    assert decided(Store((entry(device="NVIDIA H100 80GB HBM3"),)))[1] == "default"
    assert tuning.family("NVIDIA H200") == tuning.family("NVIDIA H100 80GB HBM3") == "hopper"


def test_files(tmp_path: Path) -> None:
    """A store travels as JSON; its digest says what is in it, in any order."""
    a, b = entry(64, rows=16), entry(1024, rows=256)
    store, path = Store((a, b)), tmp_path / "my tuning ü.json"
    store.save(path)
    assert Store.load(path) == store == Store((b, a))
    assert hash(Store.load(path)) == hash(store)
    again = Store((dataclasses.replace(a, speedup=9.0), b))  # the same choices, measured on another day
    assert (again, hash(again), again.digest) == (store, hash(store), store.digest)
    other = dataclasses.replace(a, config={"rows": 32})
    assert (store | Store((other,))).digest != store.digest
    assert len((store | Store((other,))).entries) == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a tuning store"),
        ("[]", "expected format 'dovetail-kernels tuning 1'"),
        ('{"format": "dovetail-kernels tuning 9", "entries": []}', "expected format"),
        ('{"format": "dovetail-kernels tuning 1"}', "entries"),
        (
            '{"format": "dovetail-kernels tuning 1", "entries": [{"device": "cpu"}]}',
            "expected the fields operation, device",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    """A file that is something else, or of another release, is named."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json.*{message}|{message}"):
        Store.load(tmp_path / "x.json")


def test_unknown_names_in_a_file(tmp_path: Path) -> None:
    """A choice that can never run is an error when it is read, not a silent default."""
    path = tmp_path / "x.json"
    for field, value, message in (
        ("operation", "atention", "'atention' is not"),
        ("implementation", "flash", "'flash'"),
    ):
        Store((entry(),)).save(path)
        content = json.loads(path.read_text())
        content["entries"][0][field] = value
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Store.load(path)


@pytest.mark.parametrize(
    ("field", "value", "expectation"),
    [
        ("sizes", {"time": 0}, "lengths of at least 1"),
        ("sizes", {"time": "64"}, "lengths of at least 1"),
        ("sizes", [64], "lengths of at least 1"),
        ("exactly", 3, "values by name"),
        ("config", [3], "keywords with whole numbers"),
        ("config", {"rows": 0}, "keywords with whole numbers"),
        ("config", {"rwos": 16}, "'blocked' has the keywords"),
        ("device", 3, "a name"),
        ("speedup", "fast", "a positive number"),
        ("entries", {}, "a list"),
    ],
)
def test_damaged_entries(tmp_path: Path, field: str, value: Any, expectation: str) -> None:
    """A damaged store fails in the middle of a run, in a trace that does not know the file."""
    path = tmp_path / "x.json"
    Store((entry(rows=16), entry(1024))).save(path)
    content = json.loads(path.read_text())
    (content if field == "entries" else content["entries"][1])[field] = value
    path.write_text(json.dumps(content))
    where = "entries" if field == "entries" else f"entries[1].{field}"
    with pytest.raises(ValueError, match=rf"x\.json.*{re.escape(f'{where}={value!r}')}; .*{expectation}"):
        Store.load(path)


def slow(x: jax.Array) -> jax.Array:
    def wait(x: Any) -> Any:
        time.sleep(0.02)
        return x

    return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_tune_finds_what_is_faster_and_right(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The fast implementation wins; the one with other results never does, nor the one that cannot be traced."""
    slow_first = Operation(
        "wait",
        (
            Implementation("slow", slow),
            Implementation("wrong", lambda x: x * 0.5),
            Implementation("broken", lambda x: x.reshape(-1, 2)),
            Implementation("fast", lambda x, sign=1: x * sign, configs=lambda call: ({"sign": -1},)),
        ),
        "none",
        "none",
    )
    monkeypatch.setattr(tuning, "OPERATIONS", (slow_first,))
    x = jnp.ones(3)
    store = tune(jax.jit(lambda x: slow_first(None, x=x) + 1), x, repeats=2)
    (found,) = store.entries
    assert (found.implementation, dict(found.config), found.device) == ("fast", {}, "cpu")
    assert found.speedup > 2
    assert "tune: wrong {} gives other results" in caplog.text
    assert "tune: broken {} fails: cannot reshape" in caplog.text
    with tuned(store):
        (decision,) = explain(lambda x: slow_first(None, x=x), x)
    assert decision.implementation.name == "fast"
    assert tune(lambda x: slow_first("slow", x=x), x, repeats=1) == Store()
    assert tune(lambda x: slow_first(None, x=x), x, repeats=1, seconds=0.0) == Store()


def test_tune_attention() -> None:
    """The real operation: whatever is found gives the same results, and other operations are left alone."""
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 150, 2, 8)), jnp.float32)
    gradient = jax.grad(lambda q: jnp.sum(jnp.sin(call(q))))
    store = tune(gradient, q, repeats=1, least=0.0, seconds=20.0, operations=["attention"])
    assert len(store.entries) == 1
    with tuned(store):
        np.testing.assert_allclose(jax.jit(gradient)(q), gradient(q), atol=1e-5)


def test_bad_input() -> None:
    """A misspelt operation would be tuned for ever without effect."""
    with pytest.raises(ValueError, match="'atention' is not an operation"):
        tune(call, Q, operations=["atention"])
    with pytest.raises(ValueError, match="repeats=0"):
        tune(call, Q, repeats=0)


def test_key_of_any_operation() -> None:
    """An operation without its own key is looked up by dtypes, flags and lengths."""
    arguments = {"x": jax.ShapeDtypeStruct((5, 3), jnp.float32), "flag": True, "scale": 0.5, "none": None}
    exactly, sizes = tuning.key(Operation("o", (), "", ""), Call("o", arguments, "cpu"))
    assert exactly == {"x.0": "float32", "flag": True}
    assert sizes == {"x.0.0": 8, "x.0.1": 4}
