"""What the linear cross-entropy refuses."""

from typing import Any

import jax.numpy as jnp
import pytest

from dovetail_kernels import CrossEntropyOptions, linear_cross_entropy

H, W, Y = jnp.ones((4, 3)), jnp.ones((3, 5)), jnp.zeros((4,), jnp.int32)
BAD: list[tuple[str, Any, dict[str, Any], Any, str]] = [
    ("rank", (H[0], W, Y), {}, ValueError, r"hidden \(3,\)"),
    ("features", (H, jnp.ones((2, 5)), Y), {}, ValueError, r"hidden \(4, 3\), weight \(2, 5\)"),
    ("no vocabulary", (H, jnp.ones((3, 0)), Y), {}, ValueError, "vocab > 0"),
    ("target shape", (H, W, Y[:3]), {}, ValueError, r"targets has shape \(3,\); expected \(4,\)"),
    ("target dtype", (H, W, jnp.ones(4)), {}, TypeError, "float32; expected integers"),
    ("weights", (H, W, Y), {"loss_weights": jnp.ones(5)}, ValueError, "loss_weights"),
    ("bias", (H, W, Y), {"bias": jnp.ones(4)}, ValueError, r"bias has shape \(4,\); expected \(5,\)"),
    ("implementation", (H, W, Y), {"implementation": "block"}, ValueError, "did you mean 'blocked'"),
    ("softcap", (H, W, Y), {"softcap": 0.0}, ValueError, "softcap=0"),
    ("softcap nan", (H, W, Y), {"softcap": float("nan")}, ValueError, "softcap=nan"),
    ("hidden dtype", (H.astype(jnp.int32), W, Y), {}, TypeError, "hidden has dtype int32"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, error: Any, message: str) -> None:
    """A wrong shape, dtype or option is refused with its value."""
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arrays, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing=1.5; expected a number from 0 to 1"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"z_loss": float("nan")}, "z_loss=nan"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    """A number out of its range is refused where it is written."""
    with pytest.raises(ValueError, match=message):
        CrossEntropyOptions(**options)


@pytest.mark.usefixtures("untyped")
def test_a_vocabulary_that_is_not_sharded() -> None:
    """Counting a whole vocabulary several times would give a plausible loss."""
    how = CrossEntropyOptions(vocab_axis="model")
    with pytest.raises(ValueError, match="vocab_axis='model', but weight varies over"):
        linear_cross_entropy(H, W, Y, options=how)
