"""A model learns another kind of text through adapters alone, and becomes a plain model again.

    python integration/pipelines/adapt.py --out DIR --minutes 10 --seeds 3

Two fifths of the minutes train a Llama on the sources of Python's standard library. It is then tuned on the language
reference, which is prose: all of its weights, or LoRA adapters of every matrix of a layer, for three tenths each. The
adapter is written for `peft`, merged into the directory tensor by tensor, and the merged model must predict the same.
"""

import argparse
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax.numpy as jnp
import numpy as np
from continued import Point, Text, llama, prepare, run, seeds
from flax import nnx

import dovetail_data as data
import dovetail_models as models
from dovetail_kernels import DenseMixer

RATE, RANK = 3e-3, 8
MATRICES = ("layers/*/attention/{query,key,value,out}", "layers/*/mlp/{gate,up,down}")


def reference(out: Path, given: Text, seed: int) -> Text:
    """The language reference as tokens of the same tokenizer, one document per topic."""
    if not (out / "reference").exists():
        (out / "topics").mkdir(exist_ok=True)
        for name, text in topics.topics.items():
            (out / "topics" / f"{name}.txt").write_text(text)
        data.build_cache(data.open_corpus(out / "topics"), given.tokenizer, out / "reference")
    return Text(given.tokenizer, *data.TokenCache.open(out / "reference").split(0.1, seed=seed))


def logits(model: Any, given: Text) -> Any:
    """What the model predicts in the first held-out rows."""
    tokens = jnp.asarray(data.Plan(given.held_out, seq_len=64, batch=2, seed=0).at(0).tokens)
    positions = jnp.tile(jnp.arange(64, dtype=jnp.int32), 2)
    return model.unembed(model.hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))[0])


def compare(out: Path, minutes: float, seed: int, corpus: Any = None) -> dict[str, list[Point]]:
    """Return the curves of tuning all weights and adapters alone; check that the merged model is the adapted one."""
    given = prepare(out, seed, corpus)
    trained, _ = run(llama(given, seed), given, 0.4 * minutes, rate=RATE, seed=seed)
    path = models.save_pretrained(trained, out / f"dense-{seed}", tokenizer=out / "tokenizer", overwrite=True)
    prose = reference(out, given, seed)
    _, whole = run(models.from_pretrained(path), prose, 0.3 * minutes, rate=RATE / 3, seed=seed)
    adapted = models.add_lora(models.from_pretrained(path), MATRICES, rank=RANK, rngs=nnx.Rngs(seed))
    adapted, curve = run(adapted, prose, 0.3 * minutes, rate=RATE, seed=seed, trained=models.LORA)
    adapter = models.save_lora(adapted, out / f"adapter-{seed}", base=str(path), overwrite=True)
    merged = models.merge_lora(path, models.load_lora(adapter, path)).save(out / f"merged-{seed}", overwrite=True)
    np.testing.assert_allclose(
        logits(models.from_pretrained(merged), prose), logits(adapted, prose), atol=1e-3, err_msg="the merged model"
    )
    return {"all weights": whole, f"adapters of rank {RANK}": curve}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    seeds(parser, "adapt", compare)
