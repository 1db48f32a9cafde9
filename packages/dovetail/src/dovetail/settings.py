"""What determines a pretraining run: one frozen dataclass, the source of flags, files and ``run.json``."""

import dataclasses
from pathlib import Path

__all__ = ["PRESETS", "ModelSettings", "OptimizerSettings", "Settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Sizes of a Llama."""

    features: int = 256
    """Width of the residual stream."""
    hidden: int = 688
    """Width of the MLP."""
    layers: int = 6
    """Blocks."""
    heads: int = 4
    """Query heads."""
    kv_heads: int | None = None
    """Key-value heads; as many as query heads by default."""
    tied: bool = False
    """Whether the unembedding is the embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with a warmup-stable-decay schedule."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Fraction of the steps that warm up."""
    decay: float = 0.5
    """Fraction of the steps, at the end, that decay to zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    beta2: float = 0.95
    """Decay of the second moment."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A pretraining run; together with the corpus it determines every number."""

    corpus: tuple[Path, ...] = ()
    """Directories and files of text, JSONL or Parquet; without any, the standard library's sources."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer directory; without one, a tokenizer is trained."""
    vocab_size: int = 4096
    """Vocabulary of a tokenizer that is trained."""
    validation: float = 0.02
    """Fraction of the documents that is kept for evaluation."""
    seq_len: int = 256
    """Tokens per row."""
    batch: int = 16
    """Rows per step, over all devices."""
    accumulate: int = 1
    """Micro-batches per step."""
    steps: int = 1000
    """Training steps."""
    seed: int = 0
    """Of initial weights and data order."""
    eval_every: int = 100
    """Steps between two evaluations."""
    eval_batches: int = 8
    """Batches per evaluation during training (the last one takes all)."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    model: ModelSettings = ModelSettings()
    """Sizes of the model."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How the parameters change."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "batch", "accumulate", "steps", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation={self.validation}; expected a fraction between 0 and 1")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch={self.batch}")


PRESETS = {
    "tiny": Settings(
        vocab_size=512,
        seq_len=128,
        batch=16,
        eval_every=20,
        eval_batches=2,
        checkpoint_every=10,
        model=ModelSettings(features=64, hidden=176, layers=2, heads=2),
        optimizer=OptimizerSettings(learning_rate=5e-3),
    ),
    "small": Settings(
        vocab_size=2048,
        seq_len=256,
        batch=8,
        eval_every=200,
        checkpoint_every=200,
        model=ModelSettings(features=128, hidden=336, layers=3, heads=4),
        optimizer=OptimizerSettings(decay=0.7),
    ),
}
