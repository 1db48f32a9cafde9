"""Which implementation runs, who decides, and that jax traces anew when the answer changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import Call, UnsupportedError, attention, causal, configured, dense, explain, prefer

Q = jnp.ones((1, 4, 2, 8))


@dataclasses.dataclass(frozen=True)
class Own:
    """A user's implementation: it knows no soft cap, and answers with sevens."""

    name: str = "own"

    def supports(self, call: Call) -> Any:
        return True if call.arguments["softcap"] is None else "knows no soft cap"

    def __call__(self, *, query: jax.Array, value: jax.Array, **rest: Any) -> Any:
        return jnp.full((*query.shape[:3], value.shape[3]), 7.0), None


def ran(function: Any, *args: Any) -> list[tuple[str, str]]:
    return [(decision.implementation.name, decision.source) for decision in explain(function, *args)]


def call(q: jax.Array, **options: Any) -> jax.Array:
    return attention(q, q, q, causal(), **options)


def test_order_of_decisions() -> None:
    """The call's own word wins over `prefer`, an inner `prefer` over an outer one, and all over the table."""
    assert ran(call, Q) == [("blocked", "default")]
    with prefer(attention="reference"):
        assert ran(call, Q) == [("reference", "prefer")]
        assert ran(lambda q: call(q, implementation="blocked"), Q) == [("blocked", "implementation=")]
        with prefer(everywhere="blocked"):
            assert ran(call, Q) == [("reference", "prefer")]
        with prefer(attention=Own()):
            assert ran(call, Q) == [("own", "prefer")]
        assert ran(call, Q) == [("reference", "prefer")]
    with prefer(everywhere="reference"):
        assert ran(call, Q) == [("reference", "prefer")]
    assert ran(call, Q) == [("blocked", "default")]


def test_own_implementation() -> None:
    """An object with a name, `supports` and a call is enough, and its reasons are heard."""
    assert (call(Q, implementation=Own()) == 7).all()
    with prefer(attention=Own()):
        (decision,) = explain(lambda q: call(q, softcap=3.0), Q)
    assert decision.implementation.name == "blocked"
    assert decision.rejected[0] == ("own", "knows no soft cap")
    with pytest.raises(UnsupportedError, match="own: knows no soft cap"):
        call(Q, softcap=3.0, implementation=Own())


def test_jit_traces_anew() -> None:
    """A jitted function that was traced under one preference must not run under another."""
    jitted = jax.jit(call)
    first = jitted(Q)
    with prefer(attention=Own()):
        assert (jitted(Q) == 7).all()
    np.testing.assert_array_equal(jitted(Q), first)
    assert ran(jitted, Q) == [("blocked", "default")], "explain looks into what is cached already"


def test_another_platform() -> None:
    """A function can be traced for a machine that is not there, and what cannot run there says why."""
    half = Q.astype(jnp.bfloat16)
    with prefer(platform="gpu"):
        text = str(explain(lambda q: attention(q, q, q, dense(jnp.ones((4, 4), bool))), half))
        assert "not cudnn: does not know the mask dense" in text
        assert "on gpu" in text
        (decision,) = explain(lambda q: attention(q, q, q), Q)
        assert decision.rejected == (("cudnn", "needs float16 or bfloat16, not float32"),)
    (decision,) = explain(call, half)
    assert decision.rejected == (("cudnn", "needs platform gpu, not cpu"),)


def test_configurations_reach_the_implementation() -> None:
    """What tuning finds is what runs."""
    wanted = configured("blocked", rows=2, chunk=1)
    (decision,) = explain(lambda q: call(q, implementation=wanted), Q)
    assert decision.config == {"rows": 2, "chunk": 1}
    assert "blocked [chunk=1, rows=2] (implementation=)" in str(explain(lambda q: call(q, implementation=wanted), Q))
    np.testing.assert_allclose(call(Q, implementation=wanted), call(Q), rtol=1e-6)


def test_several_in_order() -> None:
    """The first that can run, runs."""
    assert ran(lambda q: call(q, implementation=["cudnn", "reference"]), Q) == [("reference", "implementation=")]
    with pytest.raises(UnsupportedError, match=r"attention: implementation='cudnn' cannot run.*\n.*needs platform gpu"):
        call(Q, implementation="cudnn")


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """A misspelt preference would otherwise do nothing."""
    with pytest.raises(ValueError, match="did you mean 'attention'"), prefer(atention="blocked"):
        pass
    with (
        pytest.raises(ValueError, match=r"no implementation 'block'.*did you mean 'blocked'"),
        prefer(attention="block"),
    ):
        pass
    with pytest.raises(ValueError, match="no operation has an implementation 'flash'"), prefer(everywhere="flash"):
        pass
    with pytest.raises(ValueError, match="platform='cuda'"), prefer(platform="cuda"):
        pass
    with pytest.raises(ValueError, match="no implementation 'flash'; expected one of"):
        call(Q, implementation="flash")
    with pytest.raises(TypeError, match="expected a name or an object with name"):
        call(Q, implementation=len)
