"""The BERT family: post-norm encoders with learned positions (Devlin et al., arXiv:1810.04805)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import einsum, take
from dovetail_models.encoder import EncoderConfig, Linear, encode
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_encoder import (
    SIZES,
    activation_field,
    attention_rules,
    linear_rules,
    mlp_rules,
    no_more_tokens,
    norm_rules,
)
from dovetail_models.layers import ACTIVATION_FUNCTIONS, exact, logits_dtype, parameter
from dovetail_runtime import constrain
from dovetail_weights import Rule, WeightMap

__all__ = ["FAMILY", "MASKED_LM", "BertConfig", "BertForMaskedLM", "BertMaskedLMConfig", "BertModel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Sizes and options of a BERT; see `EncoderConfig` for the others.

    Attributes:
        vocab_size: tokens.
        max_position: learned positions.
        types: kinds of tokens, such as those of a first and a second sentence.
    """

    vocab_size: int
    max_position: int = 512
    types: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "max_position", "types"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertMaskedLMConfig(BertConfig):
    """Sizes and options of a BERT that predicts tokens; the unembedding is the embedding."""


class Embeddings(nnx.Module):
    """Tokens, positions and kinds of tokens, added up and normalised."""

    def __init__(self, config: BertConfig, *, init: Any, dtype: Any, rngs: nnx.Rngs) -> None:
        d = config.features
        self.tokens = parameter(rngs, (config.vocab_size, d), ("vocab", "embed"), init, dtype, table=True)
        self.positions = parameter(rngs, (config.max_position, d), (None, "embed"), init, dtype, table=True)
        self.types = parameter(rngs, (config.types, d), (None, "embed"), init, dtype, table=True)
        self.norm = config.norm(dtype)

    def __call__(self, tokens: Any, types: Any, positions: Any, dtype: Any) -> jax.Array:
        """Return the embeddings of ``[batch, time]`` tokens."""
        tables = (self.tokens, self.positions, self.types)
        looked = [
            take(table.get_value(), ids).astype(dtype)
            for table, ids in zip(tables, (tokens, positions, types), strict=True)
        ]
        return self.norm(sum(looked[1:], looked[0]))


class BertModel(nnx.Module):
    """A BERT with its pooler.

    Args:
        config: sizes and options.
        rngs: where the initial weights come from.
        pooler: make a pooler.
        param_dtype: dtype of the parameters.
        dtype: dtype of activations and products; None for `param_dtype`.
    """

    def __init__(
        self, config: BertConfig, *, rngs: nnx.Rngs, pooler: bool = True, param_dtype: Any = jnp.float32,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        self.config, self.vocab_size = config, config.vocab_size
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        weights: dict[str, Any] = {"init": config.init, "dtype": param_dtype, "rngs": rngs}
        self.embeddings = Embeddings(config, **weights)
        self.layers = nnx.List([config.block(before=False, **weights) for _ in range(config.layers)])
        if pooler:
            self.pooler = Linear(config.features, config.features, ("embed", None), **weights)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        types: Int[Array, "batch time"] | None = None,
        segment_ids: Int[Array, "batch time"] | None = None,
        positions: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time features"]:
        """Return the last hidden states.

        Args:
            tokens: ids of the vocabulary.
            types: kind of each token; None for 0.
            segment_ids: tokens see those with the same number; 0 is padding. None lets all tokens of a row see each
                other. An attention mask of ones and zeros is one.
            positions: of each token; None counts from the start of the row.

        Raises:
            ValueError: rows are longer than there are positions, or shapes do not fit.
        """
        time = tokens.shape[1]
        no_more_tokens(time, self.config.max_position)
        types = jnp.zeros_like(tokens) if types is None else types
        positions = jnp.arange(time, dtype=jnp.int32)[None] if positions is None else positions
        return encode(self.layers, self.embeddings(tokens, types, positions, self.dtype), segment_ids)

    def pooled(self, hidden: Float[Array, "batch time features"]) -> Float[Array, "batch features"]:
        """Return what the pooler makes of the first token of each row."""
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def example(self, time: int) -> tuple[Any, ...]:
        """Return shapes of the arguments of a call on one row."""
        return (jax.ShapeDtypeStruct((1, time), jnp.int32),)


class BertForMaskedLM(nnx.Module):
    """A BERT that predicts the token of each place; for the arguments see `BertModel`, for `output_dtype` `Decoder`."""

    def __init__(
        self, config: BertMaskedLMConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, dtype: Any = None,
        output_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        self.config, self.vocab_size = config, config.vocab_size
        self.encoder = BertModel(config, rngs=rngs, pooler=False, param_dtype=param_dtype, dtype=dtype)
        self.dtype, self.output_dtype = self.encoder.dtype, logits_dtype(output_dtype)
        weights: dict[str, Any] = {"init": config.init, "dtype": param_dtype, "rngs": rngs}
        self.transform = Linear(config.features, config.features, ("embed", None), **weights)
        self.norm = config.norm(param_dtype)
        self.bias = parameter(rngs, (config.vocab_size,), ("vocab",), nnx.initializers.zeros, param_dtype)

    def hidden(self, tokens: Int[Array, "batch time"], **options: Any) -> Float[Array, "batch time features"]:
        """Return what the logits are made of; for losses that unembed in chunks. Options are those of `BertModel`."""
        states = self.encoder(tokens, **options)
        flat = ACTIVATION_FUNCTIONS[self.config.activation](self.transform(states.reshape(-1, states.shape[-1])))
        return self.norm(flat).reshape(states.shape)

    def unembedding(self) -> tuple[Any, Any, None]:
        """Return ``(W[features, vocab], bias[vocab], None)``."""
        table = self.encoder.embeddings.tokens.get_value()
        return table.T, self.bias.get_value(), None

    def __call__(self, tokens: Int[Array, "batch time"], **options: Any) -> Float[Array, "batch time vocab"]:
        """Return the logits; options are those of `BertModel`."""
        weight, bias, _ = self.unembedding()
        hidden = self.hidden(tokens, **options)
        logits = einsum("td,dv->tv", hidden.reshape(-1, hidden.shape[-1]), weight, dtype=exact(hidden))
        logits = (logits + bias.astype(logits.dtype)).astype(self.output_dtype)
        return constrain(logits, "tokens", "vocab").reshape(*tokens.shape, -1)

    def example(self, time: int) -> tuple[Any, ...]:
        """Return shapes of the arguments of a call on one row."""
        return self.encoder.example(time)


NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
}


def _encoder_rules(config: BertConfig, ours: str = "", theirs: str = "") -> list[Rule]:
    layer, their_layer = f"{ours}layers/{{i}}", f"{theirs}encoder.layer.{{i}}"
    tables = {"tokens": "word", "positions": "position", "types": "token_type"}
    return [
        *(
            Rule(f"{ours}embeddings/{name}", f"{theirs}embeddings.{their}_embeddings.weight")
            for name, their in tables.items()
        ),
        *norm_rules(f"{ours}embeddings/norm", f"{theirs}embeddings.LayerNorm"),
        *attention_rules(config, f"{layer}/attention", their_layer, NAMES),
        *norm_rules(f"{layer}/attention_norm", f"{their_layer}.attention.output.LayerNorm"),
        *mlp_rules(f"{layer}/mlp", their_layer, "intermediate.dense", "output.dense"),
        *norm_rules(f"{layer}/mlp_norm", f"{their_layer}.output.LayerNorm"),
    ]


def _weight_map(config: BertConfig) -> WeightMap:
    return WeightMap([*_encoder_rules(config), *linear_rules("pooler", "pooler.dense")])


def _masked_lm_weight_map(config: BertMaskedLMConfig) -> WeightMap:
    return WeightMap(
        [
            *_encoder_rules(config, "encoder/", "bert."),
            *linear_rules("transform", "cls.predictions.transform.dense"),
            *norm_rules("norm", "cls.predictions.transform.LayerNorm"),
            Rule("bias", "cls.predictions.bias"),
        ]
    )


IGNORED = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "directionality", "pooler_fc_size"),
    *("pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),  # read by nobody
)
TASKS = (
    *("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"),
    *("NextSentencePrediction", "PreTraining", "MaskedLM"),
)
HEADS = ("cls.*", "classifier.*", "qa_outputs.*")
OLD = tuple(
    (f"{{x}}.LayerNorm.{new}", f"{{x}}.LayerNorm.{old}") for new, old in (("weight", "gamma"), ("bias", "beta"))
)
WITHIN, BARE = (("{x}", "bert.{x}"),), (("bert.{x}", "{x}"),)


def _config_map(architecture: str, config: Any, **more: Any) -> ConfigMap:
    return ConfigMap(
        architecture,
        "bert",
        config,
        sizes={"vocab_size": "vocab_size", **SIZES},
        attends=False,
        options={
            "max_position_embeddings": ("max_position", int, 512),
            "type_vocab_size": ("types", int, 2),
            "layer_norm_eps": ("norm_eps", float, 1e-12),
            "initializer_range": ("init_std", float, 0.02),
        },
        refused={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
        others=(activation_field("hidden_act", "activation", "gelu"),),
        **more,
    )


FAMILY = Family(
    BertModel,
    _config_map(
        "BertModel",
        BertConfig,
        ignored=(*IGNORED, "tie_word_embeddings"),
        wholes=tuple(f"BertFor{task}" for task in TASKS),
    ),
    _weight_map,
    ignored=("*.position_ids", "{bert.,}pooler.*", *HEADS),
    spellings=(OLD, WITHIN, (*OLD, *WITHIN)),
)
MASKED_LM = Family(
    BertForMaskedLM,
    _config_map(
        "BertForMaskedLM",
        BertMaskedLMConfig,
        ignored=IGNORED,
        fixed={"tie_word_embeddings": True},
        wholes=("BertForPreTraining",),
    ),
    _masked_lm_weight_map,
    ignored=("*.position_ids", "cls.predictions.decoder.*", "cls.seq_relationship.*", "{bert.,}pooler.*"),
    spellings=(OLD, BARE, (*OLD, *BARE)),
)
