"""Attention by cuDNN, for masks that it knows itself: causal, causal window, lengths. A dense mask is never made."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dovetail_kernels._mask import And
from dovetail_kernels._mask_arrays import Lengths
from dovetail_kernels._mask_positions import Causal, Window
from dovetail_kernels.masks import Mask
from dovetail_kernels.operation import Call

__all__ = ["attention", "supports"]

WIDEST, WIDEST_BEFORE_HOPPER = 256, 128


def parts(mask: Mask | None) -> dict[type, Any] | None:
    """Return the terms of a conjunction by type, or None where one is unknown to cuDNN or comes twice."""
    if mask is None:
        return {}
    if isinstance(mask, And):
        a, b = parts(mask.a), parts(mask.b)
        return None if a is None or b is None or a.keys() & b.keys() else a | b
    return {type(mask): mask} if isinstance(mask, (Causal, Window, Lengths)) else None


def supports(call: Call) -> Literal[True] | str:
    """Return True, or why cuDNN's fused attention cannot run the call."""
    given = call.arguments
    query, key, value = (given[name] for name in ("query", "key", "value"))
    terms = parts(given["mask"])
    extra = [name for name in ("bias", "sinks", "softcap", "dropout") if given[name] is not None]
    sizes = (query.shape[3], value.shape[3])
    checks = {
        f"needs platform gpu, not {call.platform}": call.platform == "gpu",
        f"needs float16 or bfloat16, not {query.dtype}": query.dtype in (jnp.float16, jnp.bfloat16),
        "needs one dtype for query, key and value": query.dtype == key.dtype == value.dtype,
        f"needs equal head sizes, not {sizes}": sizes[0] == sizes[1],
        f"needs head sizes that are multiples of 8 and at most {WIDEST}": sizes[0] % 8 == 0 and sizes[0] <= WIDEST,
        f"has no {', '.join(extra)}": not extra,
        "has no log-sum-exp with gradients": not given["return_lse"],
        "has no offsets": _zero(given["query_offset"]) and _zero(given["key_offset"]),
        f"does not know the mask {given['mask']}": terms is not None,
    }
    if terms is not None:
        causal, near = Causal in terms, terms.get(Window)
        checks["needs a causal window without a right side"] = near is None or (causal and near.right is None)
        checks["needs as many keys as queries for a causal mask"] = not causal or query.shape[1] == key.shape[1]
    failed = [reason for reason, fine in checks.items() if not fine]
    return failed[0] if failed else _on_device(query.shape[3])


def _on_device(dim: int) -> Literal[True] | str:
    """Return True, or why the GPU of this machine cannot; True where it has none and lowers for another machine.

    That cuDNN is installed need not be asked: jax has no CUDA devices without it.
    """
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return True
    if "cuda" not in device.client.platform_version:
        return f"needs an NVIDIA GPU, not {device.device_kind}"
    capability = str(device.compute_capability)
    if dim > WIDEST_BEFORE_HOPPER and float(capability) < 9:
        return f"needs compute capability 9.0 for head sizes above {WIDEST_BEFORE_HOPPER}, not {capability}"
    return True


def _zero(offset: Any) -> bool:
    return isinstance(offset, int) and offset == 0


def attention(
    *, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None, scale: float, **rest: Any
) -> tuple[jax.Array, None]:
    """See `dovetail_kernels.attention`; `supports` has refused what `rest` may not hold."""
    del rest
    terms = parts(mask)
    assert terms is not None
    lengths = terms.get(Lengths, Lengths(None, None))
    out = jax.nn.dot_product_attention(
        *(_batched_in_front(x) for x in (query, key, value)),
        scale=scale,
        is_causal=Causal in terms,
        query_seq_lengths=lengths.query,
        key_value_seq_lengths=lengths.key,
        local_window_size=(terms[Window].left - 1, 0) if Window in terms else None,
        implementation="cudnn",
    )
    if lengths.key is not None:  # without keys the result is 0, whatever the kernel leaves there
        out = jnp.where(lengths.key[:, None, None, None] > 0, out, jnp.zeros((), out.dtype))
    return _batched_in_front(out), None


def _batched_in_front(x: jax.Array) -> jax.Array:
    """Return the array; under `jax.vmap` its mapped axis is the first, in the gradient too: jax's call takes no other.

    That is what the rules of a squeeze do; no other axis is touched, they may be spread over devices.
    """
    return jax.lax.squeeze(jax.lax.expand_dims(x, (0,)), (0,))
