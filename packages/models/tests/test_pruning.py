"""If these fail, a narrower model computes something else than the one whose removed parts give nothing."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import FEW, MODELS, by_default
from surgery_toys import TOKENS, flat, made, replaced, same

from dovetail_kernels import route
from dovetail_models import (
    Gemma3Multimodal,
    from_pretrained,
    lazy,
    output_norms,
    prune_experts,
    prune_heads,
    prune_hidden,
    save_pretrained,
    strongest,
)
from dovetail_weights import WeightsError

HEADS = {name: kind for name, kind in MODELS.items() if name not in ("gpt2", "mamba2", "olmo2", "olmo3")}
HIDDEN = [name for name, (_, config) in MODELS.items() if name not in ("mamba2", "mixtral", "gpt_oss", "qwen3_next")]
EXPERTS = [name for name, (_, config) in MODELS.items() if hasattr(config, "experts")]


def parts(model: Any, end: str) -> dict[str, np.ndarray]:
    """Return what leads out of the layers."""
    return {a: np.array(x) for a, x in flat(model).items() if a.endswith(end) and ("layers/" in a or "ahead/" in a)}


@pytest.mark.parametrize("name", by_default(HEADS, FEW))
def test_heads_that_went_gave_nothing(name: str, logits: Any) -> None:
    """The model is the one in which their output weights are zero; every layer loses others."""
    model, latent = made(name), name.startswith("deepseek")
    zeroed = {a: x for a, x in parts(model, "attention/out").items() if x.ndim == 3}  # the others are recurrent
    groups, share = (4, 1) if latent else (2, 2)
    keep = {}
    for place, (address, value) in enumerate(zeroed.items()):
        layer = 1 if name == "qwen3_next" else sorted(zeroed, key=lambda a: a.startswith("ahead")).index(address)
        keep[layer] = [i for i in range(groups) if i % 2 == (place + 1) % 2]
        value[[i for i in range(4) if i // share not in keep[layer]]] = 0
    pruned = prune_heads(model, keep)
    assert pruned.config.heads == 2
    expected = logits(replaced(model, zeroed), TOKENS)
    np.testing.assert_allclose(logits(pruned, TOKENS), expected, atol=1e-5)
    assert abs(expected - logits(model, TOKENS)).max() > 0.01


@pytest.mark.parametrize("name", by_default(HIDDEN, FEW))
def test_hidden_features_that_went_gave_nothing(name: str, logits: Any) -> None:
    model = made(name)
    downs = {a: x for a, x in parts(model, "mlp/down").items() if "experts" not in a}
    pruned = prune_hidden(model, [0, 3, 4, 7])
    assert pruned.config.hidden == 4
    for value in downs.values():
        value[[i for i in range(len(value)) if i not in (0, 3, 4, 7)]] = 0
    np.testing.assert_allclose(logits(pruned, TOKENS), logits(replaced(model, downs), TOKENS), atol=1e-5)


@pytest.mark.parametrize("name", by_default(EXPERTS, FEW))
def test_experts_that_went_are_never_chosen(name: str, logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is the one in which their logits are minus infinity, whatever the scoring."""
    kind, config = MODELS[name]
    changes = {"experts": 8, "top_k": 2} if getattr(config, "expert_groups", None) else {"experts": 5, "top_k": 2}
    model = kind(dataclasses.replace(config, **changes), rngs=nnx.Rngs(3))
    keep = [1, 3, 4, 6] if changes["experts"] == 8 else [0, 2, 3]
    gone = jnp.asarray([i for i in range(changes["experts"]) if i not in keep])

    def masked(scores: Any, *args: Any, **options: Any) -> Any:
        if scores.shape[1] == changes["experts"]:
            scores = scores.at[:, gone].set(-jnp.inf)
            bias = options.get("bias")
            options["bias"] = bias if bias is None else bias.at[gone].set(-jnp.inf)
        return route(scores, *args, **options)

    pruned = prune_experts(model, keep)
    assert pruned.config.experts == len(keep)
    before = logits(model, TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[type(model.layers[-1].mlp.router).__module__], "route", masked)
        expected = logits(model, TOKENS)
    assert abs(expected - before).max() > 1e-3
    np.testing.assert_allclose(logits(pruned, TOKENS), expected, atol=1e-5)


@pytest.mark.thin(2)
@pytest.mark.parametrize(("operate", "keep"), [(prune_heads, [1]), (prune_hidden, [2, 5, 6])])
def test_a_directory(operate: Any, keep: list[int], tmp_path: Path) -> None:
    """A checkpoint becomes what the model in memory becomes; fields of config.json are the new ones."""
    for name in ("phi3", "glm4_moe"):
        model = made(name)
        pruned = operate(save_pretrained(model, tmp_path / f"{name} a"), keep)
        same(from_pretrained(pruned.save(tmp_path / f"{name} b")), operate(model, keep))


def test_norms_of_outputs() -> None:
    """Norms are those of the weights that lead out, by key-value head, expert or feature."""
    model = made("gpt_oss")
    out, down = flat(model)["layers/1/attention/out"], flat(model)["layers/1/mlp/experts/down"]
    heads = np.sqrt((out.astype(np.float64) ** 2).sum((1, 2)).reshape(2, 2).sum(1))
    np.testing.assert_allclose(output_norms(model, "heads")[1], heads, rtol=1e-5)
    np.testing.assert_allclose(
        output_norms(model, "experts")[1], [np.linalg.norm(expert.astype(np.float64)) for expert in down], rtol=1e-5
    )
    dense = made("mistral")
    rows = [np.linalg.norm(row.astype(np.float64)) for row in flat(dense)["layers/0/mlp/down"]]
    np.testing.assert_allclose(output_norms(dense, "hidden")[0], rows, rtol=1e-5)
    broken = replaced(dense, {"layers/1/mlp/down": np.full((12, 8), np.nan, np.float32)})
    with pytest.raises(WeightsError, match="layers/1/mlp/down has values that are not finite"):
        output_norms(broken, "hidden")
    with pytest.raises(ValueError, match="MistralConfig: no layer has experts"):
        output_norms(dense, "experts")


def test_units_there_are(untyped: None) -> None:
    with pytest.raises(ValueError, match="units='layers'; expected one of"):
        output_norms(made("mistral"), "layers")  # pyright: ignore[reportArgumentType]


def test_strongest() -> None:
    assert strongest({3: [1, 5, 5, 0, 9]}, 3) == {3: [1, 2, 4]}
    assert strongest({0: [9, 8, 1, 2]}, 2, groups=2) == {0: [0, 3]}
    for scores, count, groups in (([1, 2], 3, 1), ([1, 2], 0, 1), ([1, 2, 3], 2, 2), ([1, 2], 1, 2), ([1, 2], 1, 0)):
        with pytest.raises(ValueError, match="count="):
            strongest({0: scores}, count, groups=groups)
    with pytest.raises(ValueError, match=r"scores of layer 7: .*nan"):
        strongest({7: [1.0, np.nan]}, 1)


BAD_KEEPS: list[tuple[Any, str]] = [
    ([], "none; expected at least one, each from 0 to 1"),
    ([2], "each from 0 to 1"),
    ([-1], "each from 0 to 1"),
    ([1, 1], "at most once"),
    ({0: [0]}, r"of layers \[0\]; expected layers \[0, 1\]"),
    ({0: [0], 1: [0, 1]}, "one number for all layers"),
]


@pytest.mark.parametrize(("keep", "message"), BAD_KEEPS)
def test_bad_choices(keep: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_heads(made("mistral"), keep)


def test_families_that_cannot() -> None:
    """By name, with the reason."""
    for name, operate, keep, message in (
        ("gpt2", prune_heads, [0], "Gpt2Config: its heads share the features"),
        ("bert", prune_heads, [0], "BertConfig: its heads share the features"),
        ("t5", prune_heads, [0], "T5EncoderConfig: its heads share"),
        ("olmo2", prune_heads, [0], "layers/0/attention/query_norm: a norm over all heads"),
        ("mamba2", prune_heads, [0], "Mamba2Config: no layer has heads"),
        ("qwen3", prune_experts, [0], "Qwen3Config: no layer has experts"),
        ("gpt_oss", prune_hidden, [0], "GptOssConfig: no layer has hidden"),
        (
            "siglip vision",
            prune_hidden,
            [0],
            r"SiglipVisionConfig cannot describe.* head/mlp/down: \(12, 8\), expected \(1, 8\)",
        ),
        ("deepseek_v3", prune_experts, [0, 1], r"\[2, 0\] experts of the 2 groups of layer 1"),
        ("gpt_oss", prune_experts, [1], "top_k=2; expected between 1 and the 1 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            operate(made(name), keep)


def test_latent_heads_need_not_divide_the_features() -> None:
    kept = prune_heads(made("deepseek_v2"), [0, 1, 3])
    assert (kept.config.heads, kept.config.features) == (3, 8)


def test_the_decoder_inside_another_model() -> None:
    from test_multimodal import CONFIG

    model = Gemma3Multimodal(CONFIG, rngs=nnx.Rngs(0))
    pruned = prune_hidden(model, [0, 2], at="text/layers")
    assert (pruned.config.text.hidden, pruned.config.vision) == (2, CONFIG.vision)
    assert lazy(pruned).tensors["text/layers/0/mlp/up"].shape == (CONFIG.text.features, 2)
