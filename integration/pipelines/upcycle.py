"""Is a mixture of experts that begins as a dense model worth it? Both go on for the same minutes.

    python integration/pipelines/upcycle.py --out DIR --minutes 10 --seeds 3

Two fifths of the minutes train a dense Llama. It is saved, upcycled from its directory into a Mixtral with 8 experts of
which a token chooses 2, and both go on from there for three tenths each. The models begin with the same loss; the
experts' steps cost more, so that there are fewer of them.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from continued import Point, llama, prepare, run, seeds

import dovetail_models as models

EXPERTS, TOP_K = 8, 2
RATE = 3e-3


def upcycled(path: Path) -> Any:
    """The model of a directory with experts, that asks for them to be used alike."""
    made = models.upcycle(path, experts=EXPERTS, top_k=TOP_K)
    return dataclasses.replace(made, config=dataclasses.replace(made.config, balanced=True, balance_coef=0.01)).build()


def compare(out: Path, minutes: float, seed: int, corpus: Any = None) -> dict[str, list[Point]]:
    """Return the curves of both continuations."""
    given = prepare(out, seed, corpus)
    trained, _ = run(llama(given, seed), given, 0.4 * minutes, rate=RATE, seed=seed)
    path = models.save_pretrained(trained, out / f"dense-{seed}", tokenizer=out / "tokenizer", overwrite=True)
    goes_on = {"dense": models.from_pretrained(path), f"{EXPERTS} experts, {TOP_K} active": upcycled(path)}
    return {
        label: run(model, given, 0.3 * minutes, rate=RATE / 3, seed=seed + 1000)[1] for label, model in goes_on.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    seeds(parser, "upcycle", compare)
