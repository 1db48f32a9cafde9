"""The encoder of T5: pre-norm blocks, positions as a bias of the attention's logits (Raffel et al., arXiv:1910.10683).

Covers T5 1.0 (plain MLPs with ReLU) and 1.1 (gated ones with GELU), and what follows them, such as Flan-T5.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import take
from dovetail_models.encoder import EncoderBlock, EncoderConfig, encode
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_encoder import ACTIVATIONS, attention_rules, norm_rules
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.layers import MLP, GatedMLP, GroupedAttention, RMSNorm, parameter
from dovetail_weights import Rule, Transpose, WeightMap

__all__ = ["FAMILY", "T5EncoderConfig", "T5EncoderModel", "relative_buckets"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5EncoderConfig(EncoderConfig):
    """Sizes and options of T5's encoder; see `EncoderConfig` for the others.

    Attributes:
        vocab_size: tokens.
        head_dim: features per head.
        gated: the MLP has a gate, to which the activation is applied.
        buckets: of distances, half of them for each direction; even.
        max_distance: from here on all distances are in the last bucket.
        init_std: factor of the initial weights' standard deviations, which are the inverse roots of their inputs.
    """

    vocab_size: int
    head_dim: int = 64
    gated: bool = False
    buckets: int = 32
    max_distance: int = 128
    activation: Any = "relu"
    norm_eps: float = 1e-6
    init_std: float = 1.0
    divided: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        super().__post_init__()
        if self.gated and self.activation == "tanh":
            raise ValueError("activation='tanh' with a gate; expected another activation, or gated=False")
        if self.buckets < 4 or self.buckets % 2:
            raise ValueError(f"buckets={self.buckets}; expected an even number of at least 4")
        if self.max_distance <= self.buckets // 4:
            raise ValueError(f"max_distance={self.max_distance}; expected more than {self.buckets // 4}")

    @property
    def dim(self) -> int:
        """Features per head."""
        return self.head_dim

    @property
    def max_position(self) -> int:
        """A length to describe; rows may have any."""
        return 512


class T5EncoderModel(nnx.Module):
    """The encoder of a T5.

    Args:
        config: sizes and options.
        rngs: where the initial weights come from.
        param_dtype: dtype of the parameters.
        dtype: dtype of activations and products; None for `param_dtype`.
    """

    def __init__(
        self, config: T5EncoderConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, dtype: Any = None
    ) -> None:
        self.config, self.vocab_size = config, config.vocab_size
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        shape, whole = (config.vocab_size, config.features), nnx.initializers.normal(config.init_std)
        self.embedding = parameter(rngs, shape, ("vocab", "embed"), whole, param_dtype, table=True)
        narrow = nnx.initializers.normal(config.init_std * config.features**-0.5)
        self.distances = parameter(
            rngs, (config.buckets, config.heads), (None, "heads"), narrow, param_dtype, table=True
        )
        self.layers = nnx.List([_block(config, dtype=param_dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.features, eps=config.norm_eps, dtype=param_dtype)

    def __call__(
        self, tokens: Int[Array, "batch time"], *, segment_ids: Int[Array, "batch time"] | None = None
    ) -> Float[Array, "batch time features"]:
        """Return the last hidden states; `segment_ids` are those of `BertModel`."""
        x = take(self.embedding.get_value(), tokens).astype(self.dtype)
        return self.norm(encode(self.layers, x, segment_ids, self._bias(tokens.shape[1])))

    def _bias(self, time: int) -> jax.Array:
        places = jnp.arange(time, dtype=jnp.int32)
        config = self.config
        buckets = relative_buckets(places[None] - places[:, None], config.buckets, config.max_distance)
        return take(self.distances.get_value(), buckets).transpose(2, 0, 1)[None].astype(jnp.float32)

    def example(self, time: int) -> tuple[Any, ...]:
        """Return shapes of the arguments of a call on one row."""
        return (jax.ShapeDtypeStruct((1, time), jnp.int32),)


def _block(config: T5EncoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> EncoderBlock:
    d, inner = config.features, config.heads * config.head_dim
    wide, narrow = (nnx.initializers.normal(config.init_std * n**-0.5) for n in (d, config.hidden))
    attention = GroupedAttention(
        d,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim,
        rotary=None,
        scale=1.0,
        init=wide,
        out_init=nnx.initializers.normal(config.init_std * inner**-0.5),
        dtype=dtype,
        rngs=rngs,
    )
    options: dict[str, Any] = {"activation": config.activation, "init": wide, "dtype": dtype, "rngs": rngs}
    if config.gated:
        mlp = GatedMLP(d, config.hidden, out_init=narrow, **options)
    else:
        mlp = MLP(d, config.hidden, bias=False, **options)
    norms = [RMSNorm(d, eps=config.norm_eps, dtype=dtype) for _ in range(2)]
    return EncoderBlock(attention, mlp, (norms[0], norms[1]), before=True)


def relative_buckets(offset: Int[Array, "*shape"], buckets: int, max_distance: int) -> Int[Array, "*shape"]:
    """Return the bucket of each offset of a key from its query.

    Half of the buckets are for keys that come later. Of each half, the first half has one bucket per distance, and the
    others grow as powers, up to `max_distance`.
    """
    half, exact = buckets // 2, buckets // 4
    distance = jnp.abs(offset)
    power = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (power * (half - exact)).astype(jnp.int32), half - 1)
    return jnp.where(offset > 0, half, 0) + jnp.where(distance < exact, distance, far)


def _weight_map(config: T5EncoderConfig) -> WeightMap:
    ours, theirs = "layers/{i}", "encoder.block.{i}.layer"
    up = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return WeightMap(
        [
            Rule("embedding", "shared.weight"),
            Rule("distances", bias),
            *attention_rules(config, f"{ours}/attention", f"{theirs}.0.SelfAttention", names),
            *norm_rules(f"{ours}/attention_norm", f"{theirs}.0.layer_norm"),
            *(
                Rule(f"{ours}/mlp/{name}", f"{theirs}.1.DenseReluDense.{their}.weight", (Transpose(),))
                for name, their in {**up, "down": "wo"}.items()
            ),
            *norm_rules(f"{ours}/mlp_norm", f"{theirs}.1.layer_norm"),
            *norm_rules("norm", "encoder.final_layer_norm"),
        ]
    )


def _read(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
    given = field(values, "feed_forward_proj", str, "relu")
    first, _, rest = given.partition("-")
    name = rest if first == "gated" else given
    gated_gelu = given == "gated-gelu"  # it has always meant the approximation by a hyperbolic tangent
    if name not in ACTIVATIONS:
        raise ConfigError(f"feed_forward_proj={given!r}; expected an activation, or 'gated-' before one")
    activation = "gelu_tanh" if gated_gelu else ACTIVATIONS[name]
    for noted, value in (("is_gated_act", first == "gated"), ("dense_act_fn", activation)):
        found = values.get(noted, None)
        if found is not None and (ACTIVATIONS.get(found) if noted == "dense_act_fn" else found) != value:
            raise ConfigError(f"{noted}={found!r} contradicts feed_forward_proj={given!r}")
    return {"activation": activation, "gated": first == "gated"}


def _write(config: T5EncoderConfig) -> Mapping[str, Any]:
    exact = config.gated and config.activation == "gelu"
    if exact:
        raise ConfigError("activation='gelu' with a gate; transformers has 'gelu_tanh' only")
    name = "gelu" if config.gated and config.activation == "gelu_tanh" else _theirs(config.activation)
    return {"feed_forward_proj": f"gated-{name}" if config.gated else name, "num_decoder_layers": config.layers}


def _theirs(activation: str) -> str:
    return {"gelu_tanh": "gelu_new"}.get(activation, activation)


FAMILY = Family(
    T5EncoderModel,
    ConfigMap(
        "T5EncoderModel",
        "t5",
        T5EncoderConfig,
        sizes={"vocab_size": "vocab_size", "d_model": "features", "d_ff": "hidden", "num_layers": "layers"}
        | {"num_heads": "heads"},
        attends=False,
        options={
            "d_kv": ("head_dim", int, 64),
            "relative_attention_num_buckets": ("buckets", int, 32),
            "relative_attention_max_distance": ("max_distance", int, 128),
            "layer_norm_epsilon": ("norm_eps", float, 1e-6),
            "initializer_factor": ("init_std", float, 1.0),
        },
        ignored=(
            *("num_decoder_layers", "dropout_rate", "classifier_dropout", "tie_word_embeddings"),
            *("scale_decoder_outputs", "n_positions", "output_past"),
        ),
        others=(Fields(("feed_forward_proj", "is_gated_act", "dense_act_fn", "num_decoder_layers"), _read, _write),),
        wholes=("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel"),
    ),
    _weight_map,
    ignored=("encoder.embed_tokens.weight", "decoder.*", "lm_head.weight"),
    spellings=((("shared.weight", "encoder.embed_tokens.weight"),),),
)
