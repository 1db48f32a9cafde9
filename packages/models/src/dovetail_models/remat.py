"""What the backward pass keeps of a layer, moves to the host, or computes again."""

import dataclasses
import difflib
from typing import Any

import jax

__all__ = ["ACTIVATIONS", "POLICIES", "Remat", "remat_policy"]

ACTIVATIONS = ("residual", "query", "key", "value", "attention", "attention_out", "mlp", "mlp_out")
"""Activations that layers name: the residual stream before a layer, the rotated query and key, the value, what
attention mixed and what becomes of it, the hidden units of a plain MLP and what becomes of them. Latent attention
has the rotated part of its keys and the latents that keys and values are made of for key and value; recurrent layers
have what goes into their convolutions (of a state-space layer c, b and x), and what is behind their gates."""


@dataclasses.dataclass(frozen=True)
class Remat:
    """Keep some activations of each layer for the backward pass, and compute the rest again (arXiv:1604.06174).

    Attributes:
        save: names of `ACTIVATIONS` that stay.
        offload: names that wait in the host's memory.
        products: the results of all matrix products with weights stay, too; only without `offload`.

    >>> Remat(save=("query", "key", "value"), offload=("residual",)).offload
    ('residual',)
    """

    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    products: bool = False

    def __post_init__(self) -> None:
        for field in ("save", "offload"):
            names = getattr(self, field)
            unknown = [name for name in names if name not in ACTIVATIONS] if isinstance(names, tuple) else [names]
            if unknown:
                raise ValueError(f"{field}={names!r}; expected a tuple of names out of {ACTIVATIONS}")
        both = sorted(set(self.save) & set(self.offload))
        if both:
            raise ValueError(f"save and offload share {both}; an activation stays or goes to the host")
        if self.products and self.offload:
            raise ValueError(f"products=True with offload={self.offload}; name what stays in save instead")

    def policy(self) -> Any:
        """Return the policy for `jax.checkpoint`."""
        policies = jax.checkpoint_policies
        if self.offload:
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=list(self.save),
                names_which_can_be_offloaded=list(self.offload),
                offload_src="device",
                offload_dst="pinned_host",
            )
        names = policies.save_only_these_names(*self.save)
        if self.products:
            return policies.save_from_both_policies(names, policies.dots_with_no_batch_dims_saveable)
        return names


POLICIES = {
    "full": Remat(),
    "attention": Remat(save=("attention",)),
    "projections": Remat(save=("query", "key", "value", "attention", "attention_out", "mlp_out")),
    "products": Remat(products=True),
    "offload": Remat(offload=("residual",)),
    "offload_attention": Remat(save=("attention",), offload=("residual", "query", "key", "value")),
}
"""Policies by name, from the least memory on a device; "offload" needs less than "full", in exchange for transfers."""


def remat_policy(wanted: "str | Remat | None") -> Remat | None:
    """Return a policy by name, or the policy itself; None keeps everything.

    Raises:
        ValueError: there is none of that name.
    """
    if wanted is None or isinstance(wanted, Remat):
        return wanted
    if wanted not in POLICIES:
        near = difflib.get_close_matches(wanted, POLICIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"remat={wanted!r}; expected None, a Remat, or one of {list(POLICIES)}{hint}")
    return POLICIES[wanted]
