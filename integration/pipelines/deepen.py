"""Is a model that grows deeper worth it? Half of its layers are repeated, and both go on for the same minutes.

    python integration/pipelines/deepen.py --out DIR --minutes 10 --seeds 3

Two fifths of the minutes train a Llama of four layers. It is saved, and its directory makes a model of six, the middle
ones twice, whose copies add nothing at first; both go on from there for three tenths each.
"""

import argparse
from pathlib import Path
from typing import Any

from continued import Point, llama, prepare, run, seeds

import dovetail_models as models

ORDER = (0, 1, 2, 1, 2, 3)
RATE = 3e-3


def compare(out: Path, minutes: float, seed: int, corpus: Any = None) -> dict[str, list[Point]]:
    """Return the curves of both continuations."""
    given = prepare(out, seed, corpus)
    trained, _ = run(llama(given, seed), given, 0.4 * minutes, rate=RATE, seed=seed)
    path = models.save_pretrained(trained, out / f"dense-{seed}", tokenizer=out / "tokenizer", overwrite=True)
    deeper = models.repeat_layers(path, ORDER, zero=True).build()
    goes_on = {"4 layers": models.from_pretrained(path), f"{len(ORDER)} layers": deeper}
    return {
        label: run(model, given, 0.3 * minutes, rate=RATE / 3, seed=seed + 1000)[1] for label, model in goes_on.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    seeds(parser, "deepen", compare)
