"""Pretraining a small Llama: our trainer against transformers with torch eager, same weights, batches and AdamW.

`extra` prints the fraction of our step that the model's own matrix products take when they run back to back, forward
and backward, in the same shapes and the same process.
"""

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import llama
from protocol import Benchmark, Case, Contestant, nearby

MODEL = {"d": 256, "layers": 6, "heads": 4, "ff": 688, "vocab": 4096, "time": 256, "batch": 16}
RATE = 1e-4


def rows(c: dict[str, Any], step: int) -> Any:
    """The tokens of a step, ``[batch, time + 1]``."""
    import numpy as np

    return np.random.default_rng(step).integers(0, c["vocab"], (c["batch"], c["time"] + 1))


class Dovetail:
    """`dovetail_train.Trainer` on `dovetail_models.Llama`, with the command line's memory setting."""

    def __init__(self, c: dict[str, Any]) -> None:
        from dovetail.memory import keep_pages

        keep_pages()
        import jax

        import dovetail_models
        import dovetail_optim
        import dovetail_train
        from dovetail_weights import write_directory

        self.name, self.config, self.step, self.seconds = f"dovetail, jax {jax.__version__}", c, 0, list[float]()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            write_directory(path, llama.weights(c), extra_files={"config.json": json.dumps(llama.hf_config(c))})
            definition, params = dovetail_models.split(dovetail_models.from_pretrained(path))
        optimizer = dovetail_optim.adamw(RATE, b2=0.999, weight_decay=0.01, decay="**")
        self.trainer = dovetail_train.Trainer(params, dovetail_train.next_token(definition), optimizer)
        self.matmul_seconds: float | None = None
        self.run()
        self.seconds.clear()

    def run(self) -> None:
        """One step."""
        from dovetail_protocols import split_rows

        started = time.perf_counter()
        batch = split_rows(rows(self.config, self.step))._replace(segment_ids=None)
        self.loss = float(self.trainer.step(batch)["loss"])
        self.step += 1
        self.seconds.append(time.perf_counter() - started)

    def checksum(self) -> list[float]:
        """The loss of the last step."""
        return [self.loss]

    def extra(self) -> dict[str, float]:
        """The share of the step that its matrix products alone would take."""
        self.matmul_seconds = self.matmul_seconds or products(self.config)
        return {"of_own_matmul_rate": round(self.matmul_seconds / statistics.median(self.seconds), 3)}


def products(c: dict[str, Any]) -> float:
    """Seconds that all matrix products of a step take, forward and backward, back to back."""
    n, d, ff, layers = c["batch"] * c["time"], c["d"], c["ff"], c["layers"]
    dense = [((n, d, d), 4 * layers), ((n, d, ff), 2 * layers), ((n, ff, d), layers), ((n, d, c["vocab"]), 1)]
    seconds = sum(
        count * (timed((m, k), (k, o)) + timed((m, o), (o, k)) + timed((k, m), (m, o))) for (m, k, o), count in dense
    )
    heads, dim = c["batch"] * c["heads"], d // c["heads"]
    for start in range(0, c["time"], 128):
        block, keys = min(128, c["time"] - start), min(start + 128, c["time"])
        logits = timed((heads, block, dim), (heads, dim, keys))  # q k^T, again in the backward pass, and dO v^T
        mixed = timed((heads, block, keys), (heads, keys, dim))  # p v and ds k
        turned = timed((heads, keys, block), (heads, block, dim))  # p^T dO and ds^T q
        seconds += layers * (3 * logits + 2 * mixed + 2 * turned)
    return seconds


def timed(a: tuple[int, ...], b: tuple[int, ...], repeat: int = 7) -> float:
    """Median seconds of one product."""
    import jax
    import jax.numpy as jnp

    x, y = jnp.full(a, 0.5), jnp.full(b, 0.5)
    product = jax.jit(jnp.matmul).lower(x, y).compile()
    times = list[float]()
    for _ in range(repeat):
        started = time.perf_counter()
        product(x, y).block_until_ready()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


class Transformers:
    """``LlamaForCausalLM`` and ``torch.optim.AdamW``, eager."""

    def __init__(self, c: dict[str, Any]) -> None:
        import torch
        import transformers

        self.name = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.torch, self.config, self.step = torch, c, 0
        config = transformers.LlamaConfig(**llama.hf_config(c), use_cache=False)
        self.model = transformers.LlamaForCausalLM(config)
        self.model.load_state_dict({name: torch.from_numpy(w) for name, w in llama.weights(c).items()})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01)
        self.run()

    def run(self) -> None:
        """One step."""
        tokens = self.torch.from_numpy(rows(self.config, self.step))
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(input_ids=tokens[:, :-1]).logits
        loss = self.torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()
        self.optimizer.step()
        self.loss = float(loss)
        self.step += 1

    def checksum(self) -> list[float]:
        """The loss of the last step."""
        return [self.loss]


def cases(rng: random.Random | None) -> list[Case]:
    """The 7M-parameter model and, with a generator, three near it."""
    steps = {"d": 64, "ff": 16, "layers": 1, "time": 64, "batch": 2, "vocab": 64}
    configs = [MODEL, *(nearby(rng, MODEL, steps) for _ in range(3 if rng else 0))]
    return [case(config) for config in configs]


def case(c: dict[str, Any]) -> Case:
    """One training step, in tokens per second."""
    sizes = "Llama d{d} L{layers} h{heads} ff{ff} V{vocab} T{time} B{batch} float32 AdamW".format(**c)
    return Case(sizes, c, tolerance=1e-4, unit="tokens/s", work=c["batch"] * c["time"])


BENCHMARK = Benchmark("train", Contestant("Dovetail", "ours"), Contestant("Transformers", "torch"), cases)
