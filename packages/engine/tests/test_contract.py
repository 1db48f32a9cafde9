"""The engine meets the contract, with every parameter doing what it says."""

import jax
from engine_toys import Letters, tiny

from dovetail_protocols.testing import check_engine


def test_the_conformance_kit_passes(make_engine):
    """Servers and tuning loops that rely on the contract break."""
    _, params = tiny()
    check_engine(
        lambda: make_engine(max_length=512, cache_dtype=None),
        params=lambda: jax.tree.map(lambda x: x * 1.0, params),
        decode=Letters().decode,
        timeout=120.0,
    )
