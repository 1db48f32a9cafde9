"""What attention refuses: operands of the wrong kind, and devices that cannot run an implementation."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dovetail_kernels import _cudnn, attention, causal, segments
from dovetail_kernels.operation import Call


@pytest.mark.parametrize(
    ("device", "dim", "reason"),
    [
        (("rocm 60300", "gfx942"), 64, "needs an NVIDIA GPU, not gfx942"),
        (("cuda 12090", "8.9"), 256, "needs compute capability 9.0 for head sizes above 128, not 8.9"),
        (("cuda 12090", "8.9"), 128, None),
        (("cuda 12090", "10.0"), 256, None),
        (None, 256, None),
    ],
)
def test_cudnn_is_asked_of_devices_that_have_it(
    monkeypatch: pytest.MonkeyPatch, device: tuple[str, str] | None, dim: int, reason: str | None
) -> None:
    """The default on other GPUs would be a crash in the compiler; a machine without any lowers for another one."""

    def devices(platform: str) -> list[Any]:
        if device is None:
            raise RuntimeError(f"no {platform}")
        client = types.SimpleNamespace(platform_version=device[0])
        return [types.SimpleNamespace(client=client, compute_capability=device[1], device_kind=device[1])]

    monkeypatch.setattr(jax, "devices", devices)
    x = jax.ShapeDtypeStruct((1, 16, 2, dim), jnp.bfloat16)
    nothing = dict.fromkeys(("mask", "bias", "sinks", "softcap", "dropout"))
    rest = {"query_offset": 0, "key_offset": 0, "return_lse": False}
    call = Call("attention", {"query": x, "key": x, "value": x, **nothing, **rest}, "gpu")
    assert _cudnn.supports(call) == (reason or True)


Q, KV = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 4, 2, 8))
BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("rank", (Q[0], KV, KV), {}, r"query \(4, 4, 8\).*expected \[batch, time, heads, dim\]"),
    ("batch", (jnp.ones((2, 4, 4, 8)), KV, KV), {}, "share"),
    ("key dim", (jnp.ones((1, 4, 4, 6)), KV, KV), {}, "share"),
    ("source", (Q, KV, KV[:, :3]), {}, "share"),
    ("heads", (jnp.ones((1, 4, 3, 8)), KV, KV), {}, "heads 3 must be a multiple of kv_heads 2"),
    ("no kv heads", (Q, KV[:, :, :0], KV[:, :, :0]), {}, "kv_heads 0"),
    ("segments", (Q, KV, KV, segments(jnp.ones((1, 3), jnp.int32))), {}, r"\(1, 3\); expected \(1, 4\)"),
    ("bias", (Q, KV, KV), {"bias": jnp.ones((1, 3, 4, 4))}, r"\(1, 3, 4, 4\); expected \(1, 4, 4, 4\)"),
    ("sinks", (Q, KV, KV), {"sinks": jnp.ones(2)}, r"\(2,\); expected \(4,\)"),
    ("softcap", (Q, KV, KV), {"softcap": 0.0}, "softcap=0.0"),
    ("offset", (Q, KV, KV), {"query_offset": jnp.ones((3,), jnp.int32)}, r"query_offset has shape \(3,\); .*\(1,\)"),
    ("implementation", (Q, KV, KV), {"implementation": "flash"}, "'flash'; expected one of"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, message: str) -> None:
    """A wrong shape or option is refused with the value, never broadcast into something plausible."""
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **options)


@pytest.mark.usefixtures("untyped")
def test_bad_types() -> None:
    """Integer operands would be softmaxed into zeros; an array is not a mask, nor is a bias of bools one."""
    with pytest.raises(TypeError, match="int32"):
        attention(Q, KV, KV.astype(jnp.int32))
    with pytest.raises(TypeError, match=r"bias has dtype bool; expected a float .* goes to mask=dense\(array\)"):
        attention(Q, KV, KV, bias=jnp.ones((1, 1, 4, 4), bool))
    with pytest.raises(TypeError, match=r"query_offset=1.5; expected an int, or an array of integers"):
        attention(Q, KV, KV, causal(), query_offset=1.5)
    with pytest.raises(TypeError, match="expected a Mask such as"):
        attention(Q, KV, KV, jnp.ones((4, 4), bool))
