"""If these fail, stacked layers are other ones than the layers one by one, or a model forgets how it was made."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from model_toys import MODELS, by_default
from surgery_toys import TOKENS, made, same

from dovetail_models import Gemma3Multimodal, init, logical_axes, merge, placements, split, stacked, unstacked
from dovetail_runtime import FSDP, mesh

DEEP = {
    "mistral": {},
    "gemma2": {"windows": (3, None) * 2 + (3,)},
    "deepseek_v3": {},
    "mamba2": {},
    "qwen3_next": {"linear": (True, False) * 2 + (True,)},
}


@pytest.mark.parametrize("name", by_default(DEEP))
def test_there_and_back(name: str) -> None:
    """Bit by bit, with the definition of a model that was built so."""
    kind, config = MODELS[name]
    config = dataclasses.replace(config, layers=5, **DEEP[name])
    options = {"rngs": nnx.Rngs(0), "remat": "attention", "output_dtype": jax.numpy.bfloat16}
    single = kind(config, **options)
    before = split(single)
    loop = kind(config, **options | {"rngs": nnx.Rngs(0)}, scan=True)
    for ours, theirs in ((stacked(single), loop), (unstacked(loop), single), (unstacked(stacked(single)), single)):
        assert split(ours)[0] == split(theirs)[0]
        assert logical_axes(ours) == logical_axes(theirs)
        same(ours, theirs)
    same(stacked(loop), loop)
    assert split(unstacked(single))[0] == before[0] == split(single)[0]


def test_numbers_are_the_same(build: Any, small: Any, logits: Any) -> None:
    model = build(dataclasses.replace(small, layers=3))
    np.testing.assert_allclose(logits(stacked(model), TOKENS), logits(model, TOKENS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_on_a_mesh(scan: bool, build: Any, small: Any) -> None:
    """Every parameter is where a model that was built so has it."""
    devices, config = mesh(fsdp=8), dataclasses.replace(small, layers=3)
    model = init(lambda: build(config, scan=scan), devices, FSDP)
    operate = unstacked if scan else stacked
    changed, (definition, params) = operate(model), split(model)
    same(changed, operate(merge(definition, jax.tree.map(jax.numpy.asarray, jax.device_get(params)))))
    fits = jax.tree.map(
        lambda x, place: x.sharding.is_equivalent_to(place, x.ndim),
        split(changed)[1],
        placements(changed, devices, FSDP),
    )
    assert jax.tree.all(fits)


def test_texts_with_images() -> None:
    from test_multimodal import CONFIG

    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, layers=4, windows=(3, None) * 2))
    single, loop = (Gemma3Multimodal(config, rngs=nnx.Rngs(0), scan=scan) for scan in (False, True))
    assert split(stacked(single))[0] == split(loop)[0]
    same(stacked(single), loop)
    same(unstacked(loop), single)


def test_what_has_no_other_layout() -> None:
    with pytest.raises(ValueError, match="none of 2 layers is followed by one of its kind"):
        stacked(made("gemma2"))
    for operate in (stacked, unstacked):
        with pytest.raises(TypeError, match="BertModel has no decoder"):
            operate(made("bert"))


def test_a_directory_has_no_layout(untyped: None) -> None:
    with pytest.raises(TypeError, match="str has no decoder"):
        stacked("path/to/model")  # pyright: ignore[reportArgumentType]
