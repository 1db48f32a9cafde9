"""If these fail, an adapter that is kept, added up, swapped or merged into a checkpoint is another one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import MODELS, by_default
from test_lora import DENSE, filled, out, weights

from dovetail_models import (
    LazyModel,
    Lora,
    add_lora,
    from_pretrained,
    lazy,
    lora_of,
    merge,
    merge_lora,
    remove_lora,
    save_pretrained,
    split,
    stack_lora,
    swap_lora,
    with_lora,
)
from dovetail_models.adapter import flat_adapter
from dovetail_protocols import paths
from dovetail_weights import WeightsError, open_directory

UP = "layers/0/mlp/up"


def adapter_of(base: Any, patterns: Any = DENSE, seed: int = 0, **options: Any) -> Any:
    return lora_of(filled(add_lora(base, patterns, rngs=nnx.Rngs(seed), **{"rank": 2} | options), seed))


def test_there_and_back(build: Any) -> None:
    """What comes off a model goes on again, bit by bit; its addresses are the model's."""
    base = build()
    model = filled(add_lora(base, DENSE, rank=2, alpha=3.0, rngs=nnx.Rngs(1), dora=True))
    adapter = lora_of(model)
    assert set(flat_adapter(adapter)) == set(weights(base))
    assert set(paths.flatten(adapter)) == {
        a for a in paths.flatten(split(model)[1]) if a.endswith(("/a", "/b", "/magnitude"))
    }
    again = with_lora(base, adapter)
    assert split(again)[0] == split(model)[0]
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(model)[1])


def test_layers_of_a_stack_may_differ(build: Any, small: Any) -> None:
    """Ranks are padded and scales made up for where layers share an array; some may have no adapter."""
    config = dataclasses.replace(small, layers=3)
    single, stacked = build(config), build(config, scan=True)
    parts = [adapter_of(single, f"layers/{i}/mlp/up", seed=i, rank=i + 1, alpha=2.0 + i) for i in (0, 2)]
    adapter = {"layers": {0: parts[0]["layers"][0], 2: parts[1]["layers"][2]}}
    np.testing.assert_allclose(out(with_lora(stacked, adapter)), out(with_lora(single, adapter)), atol=1e-5)
    dora = {"layers": {1: adapter_of(single, "layers/1/mlp/up", dora=True)["layers"][1]}}
    np.testing.assert_allclose(out(with_lora(stacked, dora)), out(with_lora(single, dora)), atol=1e-4)


@pytest.mark.parametrize("dora", [0, 1, 2])
def test_magnitudes_of_some_layers_of_a_stack(dora: int, build: Any, small: Any) -> None:
    """Whichever layer has one: a magnitude that nobody asked for would train, and come off the model with the rest."""
    config = dataclasses.replace(small, layers=3)
    single, stacked = build(config), build(config, scan=True)
    parts = {i: adapter_of(single, f"layers/{i}/mlp/up", dora=i == dora)["layers"][i] for i in range(3)}
    others = ", ".join(f"layers/{i}/mlp/up" for i in range(3) if i != dora)
    with pytest.raises(ValueError, match=f"cycle/0/mlp/up: .*layers/{dora}/mlp/up have magnitudes and {others} have"):
        with_lora(stacked, {"layers": parts})
    assert out(with_lora(single, {"layers": parts})).shape


def test_the_layer_of_a_stack_that_does_not_fit_is_named(build: Any, small: Any) -> None:
    """An adapter has no such address as that of the stacked layers."""
    config = dataclasses.replace(small, layers=3)
    single, stacked = build(config), build(config, scan=True)
    slots = add_lora(stacked, "layers/**/mlp/up", rank=2, rngs=nnx.Rngs(0))
    third = "layers/2/mlp/up"
    good = adapter_of(single, "layers/*/mlp/up")
    for bad, match in (
        (lora(a=jnp.ones((15, 2))), "the adapter does not fit"),
        (lora(b=jnp.full((2, 32), jnp.inf)), "holds NaN"),
    ):
        adapter = {"layers": {**good["layers"], 2: {"mlp": {"up": bad}}}}
        for use in (with_lora, swap_lora):
            with pytest.raises(ValueError, match=f"^{third}.*{match}"):
                use(stacked if use is with_lora else slots, adapter)
    with pytest.raises(ValueError, match=f"^{third}: the adapter has rank 3"):
        swap_lora(slots, adapter_of(single, third, rank=3))
    with pytest.raises(ValueError, match=f"^{third}: the adapter has magnitudes"):
        swap_lora(slots, adapter_of(single, third, dora=True))


def test_slots_of_scale_zero(build: Any) -> None:
    """They take what does nothing either; nothing in `b` makes up for a scale of 0."""
    base = build()
    one = adapter_of(base, UP)
    slots = with_lora(base, stack_lora([one], [0.0]))
    with pytest.raises(ValueError, match=f"{UP}: the adapter has scale 1.0, and the model's is 0.*add_lora"):
        swap_lora(slots, one)
    for nothing in (None, stack_lora([one], [0.0])):
        np.testing.assert_array_equal(out(swap_lora(slots, nothing)), out(base))


@pytest.mark.parametrize("name", by_default(["qwen3", "mixtral"], ("qwen3",)))
def test_stacked_adapters_are_the_weighted_sum(name: str) -> None:
    """In float64: the change of each weight is the weighted sum of the changes."""
    kind, config = MODELS[name]
    base = kind(config, rngs=nnx.Rngs(0))
    chosen = weights(base)
    one, two = adapter_of(base, chosen, 1, rank=1, alpha=3.0), adapter_of(base, chosen[1:], 2, rank=3)
    joined = flat_adapter(stack_lora([one, two], [0.5, -2.0]))

    def change(part: Lora) -> np.ndarray:
        a, b = np.asarray(part.a, np.float64), np.asarray(part.b, np.float64)
        return part.scale * np.matmul(
            a.reshape(*a.shape[: part.leading], -1, part.rank), b.reshape(*b.shape[: part.leading + 1], -1)
        )

    first, second = flat_adapter(one), flat_adapter(two)
    for address, part in joined.items():
        expected = 0.5 * change(first[address]) + (-2.0 * change(second[address]) if address in second else 0)
        np.testing.assert_allclose(change(part), expected, atol=1e-6 * np.abs(expected).max())
        assert part.rank == (4 if address in second else 1)
    assert out(with_lora(base, stack_lora([one, two]))).shape


def test_equal_scales_are_kept(build: Any) -> None:
    one, two = (adapter_of(build(), UP, seed, alpha=8.0) for seed in (1, 2))
    parts = [flat_adapter(a)[UP] for a in (one, two)]
    joined = flat_adapter(stack_lora([one, two], [2.0, 2.0]))[UP]
    assert joined.scale == 8.0
    np.testing.assert_array_equal(joined.b, jnp.concatenate([part.b for part in parts]))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.soak), True], ids=["lora", "dora"])
def test_swapped_adapters(scan: bool, dora: bool, build: Any, small: Any) -> None:
    """One compiled program serves adapters of other ranks, scales and weights, and none at all."""
    config = dataclasses.replace(small, layers=2)
    base, single = build(config, scan=scan), build(config)
    slots = add_lora(base, DENSE, rank=4, alpha=2.0, rngs=nnx.Rngs(1), dora=dora)
    traces = []

    @jax.jit
    def run(params: Any) -> Any:
        traces.append(1)
        return out(merge(split(slots)[0], params))

    plain = out(base)
    for adapter in (
        None,
        adapter_of(single, DENSE, 1, rank=4, alpha=2.0, dora=dora),
        adapter_of(single, ["layers/1/mlp/*", "embedding"], 2, rank=1, alpha=5.0),
        None,
    ):
        swapped = swap_lora(slots, adapter)
        wanted = plain if adapter is None else out(merge_lora(single, adapter))
        np.testing.assert_allclose(run(split(swapped)[1]), wanted, atol=1e-4)
    assert len(traces) == 1
    jax.tree.map(np.testing.assert_array_equal, split(remove_lora(swapped))[1], split(base)[1])


@pytest.mark.parametrize("name", by_default(["gemma2", "gpt2", "gpt_oss"], ("gpt2", "gpt_oss")))
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_checkpoint_is_merged_tensor_by_tensor(name: str, dora: bool, tmp_path: Any) -> None:
    kind, config = MODELS[name]
    base = kind(config, rngs=nnx.Rngs(0))
    folder = save_pretrained(base, tmp_path / "base", token_ids={"eos_token_id": 3})
    adapter = adapter_of(base, weights(base), dora=dora)
    made = merge_lora(folder, adapter)
    assert isinstance(made, LazyModel)
    made.save(tmp_path / "merged")
    expected = merge_lora(with_lora(base, adapter))
    for model in (from_pretrained(tmp_path / "merged"), made.build(), merge_lora(base, adapter)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split(model)[1], split(expected)[1])
    assert lazy(tmp_path / "merged").token_ids == {"eos_token_id": 3}


def test_parts_of_a_sum_are_read_alone(build: Any, small: Any) -> None:
    """A device reads its part of base and adapter, in the dtype of the checkpoint."""
    base = build(param_dtype=jnp.bfloat16)
    adapter = adapter_of(base, DENSE, dora=True)
    tensors = merge_lora(lazy(base), adapter).tensors
    for address in (UP, "layers/0/attention/query", "layers/0/attention/out", "embedding"):
        tensor = tensors[address]
        index = tuple(slice(1, n - 1) for n in tensor.shape)
        assert tensor.dtype == jnp.bfloat16
        np.testing.assert_array_equal(tensor.read(index), tensor.read()[index])


def test_a_checkpoint_that_cannot_be_merged_leaves_nothing(build: Any, tmp_path: Any) -> None:
    base = build()
    folder = save_pretrained(base, tmp_path / "base")
    part = flat_adapter(adapter_of(base, UP))[UP]
    huge = {"layers": {0: {"mlp": {"up": dataclasses.replace(part, scale=1e38, b=part.b * 1e3)}}}}
    with pytest.raises(WeightsError, match=f"{UP} with its adapter: holds NaN"):
        merge_lora(folder, huge).save(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert len(open_directory(folder)) > 3


def lora(**changed: Any) -> Lora:
    return Lora(**{"a": jnp.ones((16, 2)), "b": jnp.ones((2, 32))} | changed)


WRONG: dict[str, tuple[Any, str]] = {
    "no such weight": (
        {"layers": {0: {"mlp": {"ap": lora()}}}},
        "layers/0/mlp/ap: .*no such weight; the nearest are: layers/0/mlp/up",
    ),
    "a layer that is not there": ({"layers": {1: {"mlp": {"up": lora()}}}}, "layers/1/mlp/up: .*no such weight"),
    "another shape": ({"head": lora()}, r"head: the adapter does not fit the weight \(16, 48\)"),
    "a vector": ({"norm": {"weight": lora()}}, "norm/weight: (a parameter|the adapter has it)"),
    "NaN": ({"layers": {0: {"mlp": {"up": lora(b=jnp.full((2, 32), jnp.nan))}}}}, "mlp/up of the adapter: holds NaN"),
    "no adapter": ({}, "the adapter is empty"),
    "another division": (
        {"layers": {0: {"attention": {"query": lora(a=jnp.ones((16, 8, 2)), b=jnp.ones((2, 4)))}}}},
        "query: .*expected 0, and 1",
    ),
    "magnitudes of others": (
        {"layers": {0: {"mlp": {"up": lora(magnitude=jnp.ones(3))}}}},
        "mlp/up: .*magnitude has shape",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_adapters_that_do_not_fit(name: str, build: Any) -> None:
    adapter, match = WRONG[name]
    base = build()
    slots = add_lora(base, DENSE, rank=2, rngs=nnx.Rngs(0), dora=True)
    for use in (
        lambda: with_lora(base, adapter),
        lambda: merge_lora(lazy(base), adapter),
        lambda: swap_lora(slots, adapter),
    ):
        with pytest.raises(ValueError, match=match):
            use()


def test_other_refusals(build: Any, tmp_path: Any, untyped: None) -> None:
    base = build()
    small, large = (adapter_of(base, UP, rank=rank) for rank in (2, 3))
    slots = add_lora(base, UP, rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"{UP}: the adapter has rank 3, the model's 2"):
        swap_lora(slots, large)
    with pytest.raises(ValueError, match=f"{UP}: the adapter has magnitudes, the model's has none"):
        swap_lora(slots, adapter_of(base, UP, dora=True))
    with pytest.raises(ValueError, match=f"{UP}: has an adapter already"):
        with_lora(slots, small)
    with pytest.raises(ValueError, match="Llama has no adapters"):
        lora_of(base)
    for operate in (
        lambda: with_lora(lazy(base), small),
        lambda: swap_lora(lazy(base), small),
        lambda: lora_of(lazy(base)),
        lambda: remove_lora(lazy(base)),
        lambda: merge_lora(lazy(base)),
        lambda: merge_lora(tmp_path),
        lambda: add_lora(lazy(base), UP, rank=2, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(
            TypeError, match=r"the model is (LazyModel|PosixPath); expected a model in memory.*adapter="
        ):
            operate()
    with pytest.raises(TypeError, match=r"up is .*expected a nested dict of Lora"):
        stack_lora([{"up": jnp.ones(3)}])


def test_adapters_that_cannot_be_stacked(build: Any) -> None:
    base = build()
    one, dora = adapter_of(base, UP), adapter_of(base, UP, dora=True)
    with pytest.raises(ValueError, match=f"{UP}: an adapter with magnitudes"):
        stack_lora([one, dora])
    other = {"layers": {0: {"mlp": {"up": lora(a=jnp.ones((8, 2)))}}}}
    with pytest.raises(ValueError, match=f"{UP}: adapters of different shapes"):
        stack_lora([one, other])
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        stack_lora([one, one], [1.0])
    with pytest.raises(ValueError, match="0 adapters"):
        stack_lora([])
    with pytest.raises(ValueError, match="finite"):
        stack_lora([one], [float("inf")])
