"""If these fail, surgery hands on numbers that are none, or takes what it cannot use without a word."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from surgery_toys import flat, made, replaced

from dovetail_models import (
    Gemma3Multimodal,
    elementwise,
    lazy,
    merge_models,
    output_norms,
    prunable,
    prune_heads,
    prune_hidden,
    prune_layers,
    repeat_layers,
    resize_vocabulary,
    save_pretrained,
    split,
    upcycle,
    widen,
)
from dovetail_models.surgery_commands import Merge, Prune
from dovetail_protocols import CommandError
from dovetail_weights import Lazy, WeightsError

SURGERIES: dict[str, Callable[[Any], Any]] = {
    "upcycle": lambda x: upcycle(x, experts=2, top_k=1),
    "upcycle with noise": lambda x: upcycle(x, experts=2, top_k=1, noise=0.1),
    "repeat": lambda x: repeat_layers(x, [0, 1, 1]),
    "leave out": lambda x: prune_layers(x, [0]),
    "fewer hidden features": lambda x: prune_hidden(x, [0, 3]),
    "fewer heads": lambda x: prune_heads(x, [1]),
    "more tokens": lambda x: resize_vocabulary(x, 25),
    "fewer tokens": lambda x: resize_vocabulary(x, 20, shrink=True),
    "wider": lambda x: widen(x, features=2),
    "merge": lambda x: merge_models([x, x]),
}


@pytest.fixture(scope="module")
def spoilt() -> Any:
    """A model with one number that is none, which no product of these surgeries leaves out."""
    up = flat(made("qwen3"))["layers/1/mlp/up"].copy()
    up[2, 3] = np.nan
    return replaced(made("qwen3"), {"layers/1/mlp/up": up})


@pytest.mark.parametrize("name", SURGERIES)
def test_numbers_that_are_none_are_named(name: str, spoilt: Any, tmp_path: Path) -> None:
    """In memory and in a directory, of which nothing is left."""
    with pytest.raises(WeightsError, match=r"layers/\d/mlp/(experts/)?up.* not finite"):
        SURGERIES[name](spoilt)
    save_pretrained(spoilt, tmp_path / "a")
    opened = SURGERIES[name](tmp_path / "a")
    with pytest.raises(WeightsError, match=r"layers/\d/mlp/(experts/)?up.* not finite"):
        opened.save(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_numbers_that_a_dtype_cannot_hold(tmp_path: Path) -> None:
    model = made("qwen3")
    save_pretrained(replaced(model, {"norm/weight": np.full(8, 1e6, np.float32)}), tmp_path / "a")
    for command in (
        Prune(source=str(tmp_path / "a"), destination=tmp_path / "b", layers=(1,), dtype="float16"),
        Merge(sources=(str(tmp_path / "a"),) * 2, destination=tmp_path / "b", dtype="float16"),
    ):
        with pytest.raises(CommandError, match="'norm/weight' has values that float16 cannot hold"):
            command.run()
    assert not (tmp_path / "b").exists()
    half = made("qwen3", param_dtype=jnp.float16)
    large = replaced(half, {"layers/0/mlp/down": np.full((12, 8), 40000, np.float16)})
    with pytest.raises(WeightsError, match="layers/0/mlp/experts/down, of float16, has values that are not finite"):
        upcycle(large, experts=4, top_k=2, granularity=2)


def test_each_parameter_keeps_its_dtype() -> None:
    model = made("qwen3", param_dtype=jnp.bfloat16)
    mixed = replaced(model, {"norm/weight": np.full(8, 1.001, np.float32)})
    found = flat(prune_layers(mixed, [0]))
    assert found["norm/weight"].dtype == np.float32
    np.testing.assert_array_equal(found["norm/weight"], np.float32(1.001))
    assert found["embedding"].dtype == jnp.bfloat16


def test_options_of_a_decoder_inside_stay() -> None:
    from test_multimodal import CONFIG

    options: dict[str, Any] = {"remat": "full", "output_dtype": jnp.bfloat16, "dtype": jnp.float32}
    model = Gemma3Multimodal(CONFIG, rngs=nnx.Rngs(0), **options)
    order = list(range(CONFIG.text.layers))
    assert split(repeat_layers(model, order, at="text/layers"))[0] == split(model)[0]


def test_norms_of_units_are_read_in_parts(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    """The experts of a large model fill no memory."""
    for name, units in (("mixtral", "experts"), ("qwen3", "heads"), ("qwen3", "hidden")):
        model = lazy(made(name))
        whole, sizes = output_norms(model, units), list[int]()

        def counted(tensor: Lazy, sizes: list[int] = sizes) -> Lazy:
            def read(index: Any) -> Any:
                part = tensor.read(index)
                sizes.append(part.size)
                return part

            return Lazy(tensor.shape, tensor.dtype, read)

        watched = dataclasses.replace(model, tensors={a: counted(tensor) for a, tensor in model.tensors.items()})
        with monkeypatch.context() as patch:
            patch.setattr(prunable, "ELEMENTS", 1)
            parts = output_norms(watched, units)
        for layer, norms in whole.items():
            np.testing.assert_allclose(parts[layer], norms, rtol=1e-6)
            assert len(sizes) == len(whole) * len(norms)


def test_directories_whose_tokens_differ(tmp_path: Path) -> None:
    """The mean of the rows of two tokens is the row of none."""
    for name, tokens in (("a", ["x", "y"]), ("b", ["y", "x"]), ("c", ["x", "y"])):
        save_pretrained(made("qwen3"), tmp_path / name)
        vocab = {token: number for number, token in enumerate(tokens)}
        values = {"model": {"vocab": vocab}, "added_tokens": [{"id": 9, "content": "z"}], "note": name}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(values))
    merge_models([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ValueError, match=r"the models differ: token 0 is 'x' \(0\), 'y' \(1\)"):
        merge_models([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=r"the models \(of which the base is the last one\) differ: token 0"):
        merge_models([tmp_path / "a", tmp_path / "c"], base=tmp_path / "b")
    ordered = {"model": {"vocab": [["x", -1.0], ["w", -2.0]]}, "added_tokens": [{"id": 9, "content": "z"}]}
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(ordered))
    with pytest.raises(ValueError, match=r"token 1 is 'y' \(0\), 'w' \(1\)"):
        merge_models([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b/tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(ValueError, match=r"tokenizer.json: TypeError.*expected a file as tokenizers writes it"):
        merge_models([tmp_path / "a", tmp_path / "b"])


def test_many_differences_are_cut() -> None:
    model = made("qwen3")
    with pytest.raises(ValueError, match=r"differ: .* and \d+ more") as raised:
        merge_models([model, repeat_layers(model, [0, 1] * 3)])
    assert len(str(raised.value)) < 1500


def test_elements_of_several_tensors() -> None:
    a, b = (Lazy((2,), np.dtype(dtype), lambda _, x=x: x) for dtype, x in MIXED.items())
    assert elementwise(np.add, a, b).read() == pytest.approx([3, 5])
    assert elementwise(np.add, b, a).read().dtype == np.float64
    with pytest.raises(ValueError, match=r"tensors have the shapes \[\(2,\), \(1,\)\]; expected one shape"):
        elementwise(np.add, a, Lazy((1,), np.dtype(np.float32), lambda _: np.zeros(1)))


MIXED = {"float32": np.array([1.0, 2.0], np.float32), "float64": np.array([2.0, 3.0])}

REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a family of a model": (lambda m: lazy(m, family="Qwen3ForCausalLM"), ValueError, "for a Qwen3; expected a direc"),
    "a revision of a model": (lambda m: lazy(m, revision="x"), ValueError, "revision='x' for a Qwen3"),
    "a revision of a lazy model": (lambda m: lazy(lazy(m), revision="x"), ValueError, "'x' for a LazyModel"),
    "one path": (lambda m: merge_models(Path("a")), ValueError, "expected a list of models or directories"),
    "one model": (merge_models, ValueError, "expected a list of models or directories"),
    "half a token": (lambda m: resize_vocabulary(m, 20.5), TypeError, "float"),
    "half an expert": (lambda m: upcycle(m, experts=8.5, top_k=1), TypeError, "float"),
    "a loop of one layer": (
        lambda m: prune_layers(made("qwen3", scan=True), [0]),
        ValueError,
        r"none of 1 layers is followed by one of its kind; .* unstacked\(model\) before a surgery",
    ),
    "a model from elsewhere": (lambda m: repeat_layers(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), [0]), TypeError, "to lazy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name: str, untyped: None) -> None:
    call, kind, match = REFUSED[name]
    with pytest.raises(kind, match=match):
        call(made("qwen3"))
