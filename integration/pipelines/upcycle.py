"""Is a mixture of experts that begins as a dense model worth it? Both go on for the same minutes.

    python integration/pipelines/upcycle.py --out DIR --minutes 10 --seeds 3

Two fifths of the minutes train a dense Llama. It is saved, upcycled from its directory into a Mixtral with 8 experts of
which a token chooses 2, and both go on from there for three tenths each. The models begin with the same loss; the
experts' steps cost more, so that there are fewer of them.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from continued import Point, Text, prepare, run, write
from flax import nnx

import dovetail_models as models

EXPERTS, TOP_K = 8, 2
RATE = 3e-3


def dense(given: Text, seed: int) -> models.Llama:
    """A model of 1.3 million parameters."""
    config = models.LlamaConfig(
        vocab_size=given.tokenizer.vocab_size, features=128, hidden=352, layers=4, heads=4, kv_heads=2, tied=True
    )
    return models.Llama(config, rngs=nnx.Rngs(seed))


def upcycled(path: Path) -> Any:
    """The model of a directory with experts, that asks for them to be used alike."""
    made = models.upcycle(path, experts=EXPERTS, top_k=TOP_K)
    return dataclasses.replace(made, config=dataclasses.replace(made.config, balanced=True, balance_coef=0.01)).build()


def compare(out: Path, minutes: float, seed: int, corpus: Any = None) -> dict[str, list[Point]]:
    """Return the curves of both continuations."""
    given = prepare(out, seed, corpus)
    trained, _ = run(dense(given, seed), given, 0.4 * minutes, rate=RATE, seed=seed)
    path = models.save_pretrained(trained, out / f"dense-{seed}", tokenizer=out / "tokenizer", overwrite=True)
    goes_on = {"dense": models.from_pretrained(path), f"{EXPERTS} experts, {TOP_K} active": upcycled(path)}
    return {
        label: run(model, given, 0.3 * minutes, rate=RATE / 3, seed=seed + 1000)[1] for label, model in goes_on.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    curves = list[dict[str, list[Point]]]()
    for seed in range(options.seeds):
        curves.append(compare(options.out, options.minutes, seed))
        for label, curve in curves[-1].items():
            print(f"seed {seed}, {label}: {curve[0].bits_per_byte:.3f} to {curve[-1].bits_per_byte:.3f} bits per byte")
    command = f"python integration/pipelines/upcycle.py --minutes {options.minutes:g} --seeds {options.seeds}"
    write(options.out, "upcycle", curves, command)
    ends = [statistics.median(one[label][-1].bits_per_byte for one in curves) for label in curves[0]]
    print(f"median: dense {ends[0]:.3f}, experts {ends[1]:.3f}: {'better' if ends[1] < ends[0] else 'a miss'}")


if __name__ == "__main__":
    main()
