"""Linear cross-entropy, forward and backward, against optax on all logits and against tokamax."""

from typing import Any

from kernel_cases.shape import Shape, gradients

BASE = {"tokens": 1024, "features": 256, "vocab": 32000}
GPT2 = {**BASE, "vocab": 50257}
VARY = {"tokens": 64, "features": 32, "vocab": 1}
CASES = [
    Shape("fwd+bwd", BASE, VARY),
    Shape("fwd+bwd", GPT2, VARY),
    Shape("fwd+bwd", BASE, {}, peer="tokamax"),
    Shape("fwd+bwd", GPT2, {}, peer="tokamax"),
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Hidden states, weight and targets."""
    import numpy as np

    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((c["tokens"], c["features"]), np.float32)
    weight = rng.standard_normal((c["features"], c["vocab"]), np.float32) * np.float32(c["features"] ** -0.5)
    return hidden, weight, rng.integers(0, c["vocab"], c["tokens"]).astype(np.int32)


def ours(c: dict[str, Any]) -> Any:
    """Our loss, by chunks of rows."""
    del c
    from dovetail_kernels import linear_cross_entropy

    return gradients(linear_cross_entropy, (0, 1))


def jax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """optax's loss on all logits."""
    del c
    import jax.numpy as jnp
    import optax

    def call(hidden: Any, weight: Any, targets: Any) -> Any:
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, targets))

    return f"optax {optax.__version__}", gradients(call, (0, 1))


def tokamax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """tokamax's loss."""
    del c
    import tokamax

    def call(hidden: Any, weight: Any, targets: Any) -> Any:
        return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, weight, reduction="sum")

    return f"tokamax {tokamax.__version__}", gradients(call, (0, 1))
