"""If these fail, a merged model is not what the papers say, or is read in more memory than a few tensors take."""

import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, FEW, MODELS, by_default
from surgery_toys import flat, made, replaced, same

from dovetail_models import (
    LazyModel,
    Llama,
    LlamaConfig,
    from_pretrained,
    lazy,
    merge_methods,
    merge_models,
    merging,
    save_pretrained,
    split,
)
from dovetail_models.lazy_parts import uniform
from dovetail_weights import WeightsError

Arrays = list[np.ndarray]


def linear(x: Arrays, base: np.ndarray, weights: list[float]) -> np.ndarray:
    return np.average(np.stack(x), axis=0, weights=weights)


def arithmetic(x: Arrays, base: np.ndarray, weights: list[float]) -> np.ndarray:
    return base + 0.7 * sum(w * (model - base) for w, model in zip(weights, x, strict=True))


def slerp(x: Arrays, base: np.ndarray, weights: list[float]) -> np.ndarray:
    a, b, t = x[0].ravel(), x[1].ravel(), weights[1] / sum(weights)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    if cosine > 1 - 1e-7:
        return (1 - t) * x[0] + t * x[1]
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * x[0] + np.sin(t * angle) * x[1]) / np.sin(angle)


def ties(x: Arrays, base: np.ndarray, weights: list[float]) -> np.ndarray:
    """Trim, elect, merge: element by element, as in section 4 of the paper."""
    trimmed = []
    for model in x:
        task = (model - base).ravel()
        kept = np.argsort(-np.abs(task), kind="stable")[: max(1, round(0.3 * task.size))]
        trimmed.append(np.where(np.isin(np.arange(task.size), kept), task, 0))
    merged = np.zeros(base.size)
    for p in range(base.size):
        values = [(w, t[p]) for w, t in zip(weights, trimmed, strict=True)]
        sign = np.sign(sum(w * v for w, v in values))
        agree = [(w, v) for w, v in values if sign != 0 and np.sign(v) == sign]
        merged[p] = sum(w * v for w, v in agree) / sum(w for w, _ in agree) if agree else 0
    return base + 0.5 * merged.reshape(base.shape)


CASES: dict[str, tuple[Callable[..., np.ndarray], int, dict[str, Any]]] = {
    "linear": (linear, 3, {}),
    "arithmetic": (arithmetic, 3, {"base": True, "scale": 0.7}),
    "slerp": (slerp, 2, {"method": "slerp"}),
    "ties": (ties, 3, {"method": "ties", "base": True, "density": 0.3, "scale": 0.5}),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", by_default(["gpt_oss", "siglip", "phi3"], ("gpt_oss",)))
def test_parameters_are_the_closed_form(name: str, family: str) -> None:
    """In float64, expert by expert."""
    truth, count, options = CASES[name]
    models, base = [made(family, seed) for seed in range(count)], made(family, 9)
    weights = [0.5, 0.3, 0.4][:count]
    result = flat(merge_models(models, weights=weights, **options | ({"base": base} if "base" in options else {})))
    for address, value in result.items():
        given = [flat(model)[address].astype(np.float64) for model in (*models, base)]
        each = zip(*given, strict=True) if "/experts/" in address else [given]
        expected = [truth(list(x), there, weights) for *x, there in each]
        np.testing.assert_allclose(
            value, expected if "/experts/" in address else expected[0], atol=2e-5, err_msg=address
        )


def test_dare_keeps_a_share_and_makes_up_for_it(build: Any) -> None:
    """What stays is the difference by its share; the mean over seeds is the sum of differences."""
    model, base = build(), build(dataclasses.replace(build().config, init_std=0.1))
    before, there = flat(model), flat(base)
    total, seeds = np.zeros_like(there["embedding"], np.float64), 60
    given = [lazy(model)]
    for seed in range(seeds):
        merged = merge_models(given, method="dare", base=lazy(base), density=0.4, seed=seed)
        ours = merged.tensors["embedding"].read()
        ratio = (ours - there["embedding"]) / (before["embedding"] - there["embedding"])
        assert np.minimum(abs(ratio), abs(ratio - 2.5)).max() < 1e-2
        total += ours
    kept = (abs(ratio) > 1).mean()
    assert abs(kept - 0.4) < 4 * (0.24 / ratio.size) ** 0.5
    spread = abs(before["embedding"] - there["embedding"]) * (0.6 / 0.4 / seeds) ** 0.5
    assert (abs(total / seeds - before["embedding"]) / spread).max() < 5
    same(*(merge_models([model], method="dare", base=base, density=0.4, seed=3) for _ in "ab"))


def test_dare_drops_other_numbers_of_each_model(build: Any) -> None:
    model, base = build(), build(dataclasses.replace(build().config, init_std=0.1))
    ours, there = (flat(x)["head"] for x in (merge_models([model, model], method="dare", base=base, density=0.5), base))
    ratio = (ours - there) / (flat(model)["head"] - there)
    assert set(np.round(ratio.ravel(), 2)) == {0, 1, 2}


def test_random_numbers_do_not_depend_on_parts() -> None:
    """Uniform, independent of each other, and the same whatever is read at a time."""
    whole = uniform(3, "x", (70, 5, 11), (slice(0, 70), slice(0, 5), slice(0, 11)))
    for index in ((slice(3, 9), slice(0, 5), slice(2, 3)), (slice(69, 70), slice(4, 5), slice(0, 11))):
        np.testing.assert_array_equal(uniform(3, "x", (70, 5, 11), index), whole[index])
    counts = np.histogram(whole, 10, (0, 1))[0]
    assert ((counts - whole.size / 10) ** 2 / (whole.size / 10)).sum() < 30
    other = uniform(3, "y", whole.shape, (slice(0, 70), slice(0, 5), slice(0, 11)))
    assert abs(np.corrcoef(whole.ravel(), other.ravel())[0, 1]) < 0.06


@pytest.mark.parametrize("name", by_default(MODELS | ENCODERS, FEW))
def test_every_family(name: str) -> None:
    """A model merged with itself, or with nothing learned, is itself up to rounding."""
    model, other = made(name), made(name, 1)
    for result in (
        merge_models([model, model], weights=[3.0, 1.0]),
        merge_models([model, other], method="slerp", weights=[1.0, 0.0]),
        merge_models([other], base=model, scale=0.0),
    ):
        for address, value in flat(result).items():
            np.testing.assert_allclose(value, flat(model)[address], rtol=1e-5, atol=1e-6, err_msg=address)


def test_nearly_parallel_vectors_follow_the_line(build: Any) -> None:
    model = build()
    doubled = replaced(model, {a: 2 * x for a, x in flat(model).items()})
    zeros = replaced(model, {a: 0 * x for a, x in flat(model).items()})
    for other, factor in ((doubled, 1.25), (zeros, 0.75)):
        result = flat(merge_models([model, other], method="slerp", weights=[3.0, 1.0]))
        for address, value in flat(model).items():
            np.testing.assert_allclose(result[address], factor * value, rtol=1e-5)


def test_directories(tmp_path: Path, build: Any) -> None:
    """The result is lazy, keeps dtype and files of the first one, and is what models in memory make."""
    models = [build(param_dtype=jnp.bfloat16), build(dataclasses.replace(build().config, init_std=0.1))]
    folders = [
        save_pretrained(model, tmp_path / str(i), token_ids={"eos_token_id": i}) for i, model in enumerate(models)
    ]
    (folders[0] / "tokenizer.json").write_text("{}")
    merged = merge_models(folders, method="ties", base=folders[1], density=0.5)
    assert isinstance(merged, LazyModel)
    made = merged.save(tmp_path / "made")
    assert (made / "tokenizer.json").exists()
    assert merged.token_ids == {"eos_token_id": 0}
    same(
        from_pretrained(made, param_dtype=jnp.bfloat16),
        merge_models(models, method="ties", base=models[1], density=0.5),
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories of three models of ten layers."""
    config, folder = (
        LlamaConfig(vocab_size=256, features=192, hidden=768, layers=10, heads=2),
        tmp_path_factory.mktemp("x"),
    )
    return [save_pretrained(Llama(config, rngs=nnx.Rngs(i)), folder / str(i)) for i in range(3)]


@pytest.mark.parametrize("method", by_default(["linear", "ties", "dare", "slerp"], ("ties", "slerp")))
def test_memory(method: str, large: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few times the largest tensor, not the models; what is computed at a time does not grow with it."""
    for module in (merging, merge_methods):
        monkeypatch.setattr(module, "ELEMENTS", 4096)
    sizes = [tensor.nbytes for tensor in lazy(large[0]).tensors.values()]
    merged = merge_models(large[:2], method=method, **({"base": large[2]} if method in ("ties", "dare") else {}))
    tracemalloc.start()
    merged.save(tmp_path / "made")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * max(sizes) < sum(sizes) / 6


def test_models_that_differ(build: Any, small: Any) -> None:
    """All differences are named, with where they are; what changes no number is none."""
    model = build()
    others = [
        build(dataclasses.replace(small, hidden=24, rope_theta=5.0)),
        build(dataclasses.replace(small, tied=True)),
        made("mistral"),
    ]
    with pytest.raises(ValueError, match="differ") as raised:
        merge_models([model, *others])
    for part in (
        "hidden=32 (0), hidden=24 (1)",
        "rope_theta=10000.0 (0), rope_theta=5.0 (1)",
        "tied=False (0), tied=True (2)",
        "layers/0/mlp/up: (16, 32) (0), (16, 24) (1)",
        "head: (16, 48) (0), None (2)",
        "LlamaConfig (0), MistralConfig (3)",
    ):
        assert part in str(raised.value)
    merge_models([model, build(dataclasses.replace(small, init_std=0.5, max_position=9))])


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "expected a list of models"),
        (2, {"method": "mean"}, r"method='mean'; expected one of \['linear', 'slerp', 'ties', 'dare'\]"),
        (2, {"weights": [1.0]}, r"weights=\[1.0\]; expected a finite number for each of 2 models"),
        (2, {"weights": [1.0, float("nan")]}, "finite number for each"),
        (2, {"weights": [1.0, -1.0]}, "sum other than 0"),
        (1, {}, "1 model; expected at least 2, or a base"),
        (3, {"method": "slerp"}, "3 models; slerp takes 2"),
        (2, {"method": "slerp", "base": True}, "base is given; slerp knows none"),
        (2, {"method": "slerp", "weights": [-1.0, 2.0]}, "expected none below 0"),
        (2, {"method": "ties"}, "base is missing; ties merges differences"),
        (2, {"method": "dare"}, "base is missing; dare merges differences"),
        (2, {"method": "ties", "base": True, "density": 0.0}, "density=0.0; expected above 0"),
        (2, {"method": "dare", "base": True, "density": 1.5}, "density=1.5; expected above 0"),
        (2, {"density": 0.5}, "density=0.5; linear keeps all"),
        (2, {"scale": 0.5}, "scale=0.5 without a base"),
        (2, {"scale": float("inf"), "base": True}, "scale=inf; expected a finite"),
        (2, {"seed": 1}, "seed=1; linear draws nothing"),
    ],
)
def test_bad_input(count: int, options: Any, message: str, build: Any) -> None:
    models = [build()] * count
    with pytest.raises(ValueError, match=message):
        merge_models(models, **options | ({"base": models[0]} if "base" in options else {}))


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "slerp"])
def test_values_that_are_no_numbers(method: str, build: Any, tmp_path: Path) -> None:
    """The tensor and the model are named, and nothing is written."""
    model = build()
    spoiled = flat(model)["layers/0/mlp/up"].copy()
    spoiled[3, 4] = np.nan
    paths = [
        save_pretrained(x, tmp_path / str(i))
        for i, x in enumerate((model, replaced(model, {"layers/0/mlp/up": spoiled})))
    ]
    merged = merge_models(paths, method=method, **({"base": model} if method in ("ties", "dare") else {}))
    with pytest.raises(WeightsError, match="layers/0/mlp/up of model 1 has values that are not finite"):
        merged.save(tmp_path / "made")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0", "1"]


def test_results_that_do_not_fit(build: Any) -> None:
    model, other = build(param_dtype=jnp.float16), build()
    large = replaced(other, {"norm/weight": np.full(16, 60000, np.float32)})
    base = replaced(other, {"norm/weight": np.full(16, -60000, np.float32)})
    with pytest.raises(WeightsError, match="norm/weight, of float16, has values"):
        merge_models([model, large], base=base, weights=[0.0, 2.0])


def test_options_of_the_first_model_stay(build: Any, small: Any) -> None:
    config = dataclasses.replace(small, layers=2)
    first, second = build(config, scan=True, remat="full"), build(config)
    assert split(merge_models([first, second]))[0] == split(first)[0]
    assert split(merge_models([second, first]))[0] == split(second)[0]
