"""From text to a trained, checkpointed, exported model by composing the packages: no command line, no run directory.

    python integration/pipelines/pretrain.py CORPUS... --out DIR --steps 200

Every process of a multi-process run executes the same file (set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID); the data order is the same for any number of processes.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import dovetail_checkpoint as checkpoint
import dovetail_data as data
import dovetail_models as models
import dovetail_optim as optim
import dovetail_runtime as runtime
import dovetail_text as text
import dovetail_train as train

SEQ_LEN, BATCH = 64, 8


def tokens(corpus: data.Corpus, out: Path) -> tuple[text.Tokenizer, data.TokenCache]:
    """Train a tokenizer and tokenise the corpus, on the first process."""
    if jax.process_index() == 0:
        tokenizer = text.train_bpe((document.text for document in corpus), 512)
        tokenizer.save_pretrained(out / "tokenizer")
        data.build_cache(corpus, tokenizer, out / "cache")
    runtime.barrier("tokens")
    return text.Tokenizer.from_pretrained(out / "tokenizer"), data.TokenCache.open(out / "cache")


def pretrain(corpus: data.Corpus, out: Path, steps: int, *, seed: int = 0, **mesh_axes: int) -> train.Trainer:
    """Train a small Llama, save checkpoints, export the result; continue where an earlier call ended."""
    tokenizer, cache = tokens(corpus, out)
    training, held_out = cache.split(0.1, seed=seed)
    plan = data.Plan(training, seq_len=SEQ_LEN, batch=BATCH, seed=seed)
    loader = iter(plan.loader(process_index=jax.process_index(), process_count=jax.process_count()))

    config = models.LlamaConfig(vocab_size=tokenizer.vocab_size, features=64, hidden=176, layers=2, heads=4, kv_heads=2)
    model = models.Llama(config, rngs=nnx.Rngs(seed))
    definition, params = models.split(model)
    loss = train.next_token(definition)
    optimizer = optim.adamw(optim.wsd(3e-3, steps, warmup=steps // 10, decay=steps // 2), clip_norm=1.0)
    mesh = runtime.mesh(**mesh_axes) if mesh_axes else None
    trainer = train.Trainer(params, loss, optimizer, mesh=mesh, rules=runtime.DATA if mesh else None)

    valid = data.Plan(held_out, seq_len=SEQ_LEN, batch=BATCH, seed=0, epochs=1)
    evaluate = train.Evaluate(jax.jit(loss), lambda: _local(valid.at(0)), every=steps)
    with checkpoint.Manager(out / "checkpoints") as checkpoints:
        start = trainer.restore(checkpoints, data=loader) if checkpoints.steps() else 0
        save = train.Checkpoint(checkpoints, max(1, steps // 4), loader)
        with train.JsonLines(out / f"process{jax.process_index()}", resume=start) as lines:
            trainer.fit(loader, steps, hooks=[evaluate, save], sinks=[lines])
    if jax.process_index() == 0:
        exported = models.merge(definition, jax.device_get(trainer.params))
        models.save_pretrained(exported, out / "model", tokenizer=out / "tokenizer", overwrite=True)
    return trainer


def _local(batch: Any) -> list[Any]:
    """This process's rows of a global batch."""
    rows = BATCH // jax.process_count()
    first = jax.process_index() * rows
    return [jax.tree.map(lambda x: x[first : first + rows], batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", nargs="*", type=Path, help="text, JSONL or Parquet; default the standard library")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    runtime.initialize()
    corpus = data.open_corpus(*options.corpus) if options.corpus else data.python_corpus()
    axes = {"data": -1} if jax.device_count() > 1 else {}
    pretrain(corpus, options.out, options.steps, **axes)


if __name__ == "__main__":
    main()
