"""What the linear cross-entropy computes and holds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import CrossEntropyOptions, configured, linear_cross_entropy


def blocks(chunk: int, bands: int = 1) -> Any:
    return configured("blocked", chunk=chunk, bands=bands)


def test_memory() -> None:
    """The full logits are never in memory: temporaries of the gradient stay far below them."""
    rows, features, vocab = 4096, 8, 20000
    shapes = (
        jax.ShapeDtypeStruct((rows, features), jnp.float32),
        jax.ShapeDtypeStruct((features, vocab), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )

    def each(*operands: jax.Array) -> jax.Array:
        how = CrossEntropyOptions(per_token=True)
        return jnp.sum(linear_cross_entropy(*operands, options=how, implementation=blocks(64)))

    for function in (functools.partial(linear_cross_entropy, implementation=blocks(64)), each):
        analysis = jax.jit(jax.grad(function, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        assert analysis.temp_size_in_bytes < rows * vocab * 4 / 10


def test_bands_save_memory() -> None:
    """Where the gradient of the weight is large, the product of a chunk is not held next to its sum."""
    shapes = (
        jax.ShapeDtypeStruct((64, 512), jnp.float32),
        jax.ShapeDtypeStruct((512, 4000), jnp.float32),
        jax.ShapeDtypeStruct((64,), jnp.int32),
    )

    def temporaries(bands: int) -> int:
        own = functools.partial(linear_cross_entropy, implementation=blocks(16, bands))
        return jax.jit(jax.grad(own, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.5 * temporaries(1)


def flops(function: Any, argnums: Any, *shapes: Any) -> float:
    return jax.jit(jax.grad(function, argnums)).lower(*shapes).compile().cost_analysis()["flops"]


def test_what_is_not_asked_for_is_not_computed() -> None:
    """Three products for all gradients, two for a frozen layer, and no more under a checkpoint that saves them."""
    shapes = (jnp.ones((64, 32)), jnp.ones((32, 128)), jnp.zeros((64,), jnp.int32))
    own = functools.partial(linear_cross_entropy, implementation=blocks(64))
    product = 2 * 64 * 32 * 128
    everything = flops(own, (0, 1), *shapes)
    assert 3 * product < everything < 4 * product
    assert flops(own, 0, *shapes) < everything - 0.9 * product
    saved = jax.checkpoint_policies.save_only_these_names("dovetail_kernels.loss_gradient")
    assert flops(jax.checkpoint(own, policy=saved), (0, 1), *shapes) < everything + 0.1 * product


def test_devices_share_the_chunks() -> None:
    """With rows over devices each computes its share of every chunk's logits, not all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    own = functools.partial(linear_cross_entropy, implementation=blocks(64))

    def work(rows: NamedSharding, whole: NamedSharding) -> float:
        shapes = (
            jax.ShapeDtypeStruct((1024, 16), jnp.float32, sharding=rows),
            jax.ShapeDtypeStruct((16, 100), jnp.float32, sharding=whole),
            jax.ShapeDtypeStruct((1024,), jnp.int32, sharding=rows),
        )
        return flops(own, (0, 1), *shapes)

    whole = NamedSharding(mesh, PartitionSpec())
    assert work(NamedSharding(mesh, PartitionSpec("data")), whole) < work(whole, whole) / 6
