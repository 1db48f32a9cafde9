"""Training steps of a deep Llama, layers as a loop over stacked weights or one after the other: their time, and that of
compiling them. For `models.py`."""

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import llama
from protocol import Case, Contestant, nearby
from train import RATE, rows

MODEL = {"d": 256, "layers": 12, "heads": 4, "ff": 688, "vocab": 4096, "time": 128, "batch": 8}


class Step:
    """A step of AdamW on the mean cross-entropy, jitted over parameters and optimizer state, which it is given."""

    scan = False

    def __init__(self, c: dict[str, Any]) -> None:
        from dovetail.memory import keep_pages

        keep_pages()
        import jax

        self.name = f"{'scanned' if self.scan else 'unrolled'}, jax {jax.__version__}"
        self.config, self.number = c, 0
        definition, params, optimizer = prepared(c, self.scan)
        self.state: tuple[Any, Any] = params, jax.jit(optimizer.init)(params)
        started = time.perf_counter()
        self.compiled = compiled(c, definition, optimizer, self.state)
        self.seconds = time.perf_counter() - started
        self.run()

    def run(self) -> None:
        """One step."""
        *state, loss = self.compiled(*self.state, rows(self.config, self.number).astype("int32"))
        self.state, self.loss, self.number = tuple(state), float(loss), self.number + 1

    def checksum(self) -> list[float]:
        """The loss of the last step."""
        return [self.loss]

    def memory(self) -> float:
        """Temporaries of a step, in MB."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 1e6

    def extra(self) -> dict[str, float]:
        """What compiling it took."""
        return {"compile_s": round(self.seconds, 2)}


class ScannedStep(Step):
    """Layers as a loop."""

    scan = True


class Compile:
    """Tracing, lowering and compiling a step, with nothing in jax's caches."""

    scan = False

    def __init__(self, c: dict[str, Any]) -> None:
        import jax

        self.name = f"{'scanned' if self.scan else 'unrolled'}, jax {jax.__version__}"
        self.config, self.twice = c, 0.0
        self.parts = prepared(c, self.scan)
        self.run()

    def run(self) -> None:
        """Compile it."""
        import jax

        jax.clear_caches()
        definition, params, optimizer = self.parts
        self.state = params, jax.eval_shape(optimizer.init, params)
        self.compiled = compiled(self.config, definition, optimizer, self.state)

    def checksum(self) -> list[float]:
        """The loss of the first step."""
        import jax
        import jax.numpy as jnp

        params = jax.tree.map(jnp.copy, self.parts[1])  # the step keeps what it is given
        *_, loss = self.compiled(params, self.parts[2].init(params), rows(self.config, 0).astype("int32"))
        return [float(loss)]

    def memory(self) -> float:
        """Temporaries of a step, in MB."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 1e6

    def extra(self) -> dict[str, float]:
        """The size of the optimized program, and the seconds for a model of twice the depth."""
        if not self.twice:
            deeper = {**self.config, "layers": 2 * self.config["layers"]}
            definition, params, optimizer = prepared(deeper, self.scan)
            import jax

            jax.clear_caches()
            started = time.perf_counter()
            compiled(deeper, definition, optimizer, (params, jax.eval_shape(optimizer.init, params)))
            self.twice = time.perf_counter() - started
        return {
            "program_kB": round(len(self.compiled.as_text()) / 1e3),
            "s_at_twice_the_depth": round(self.twice, 2),
        }


class ScannedCompile(Compile):
    """Layers as a loop."""

    scan = True


def prepared(c: dict[str, Any], scan: bool) -> tuple[Any, Any, Any]:
    """Return definition and parameters of the model, the weights of `llama.weights`, and the optimizer."""
    import optax

    from dovetail_models import from_pretrained, split
    from dovetail_weights import write_directory

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_directory(path, llama.weights(c), extra_files={"config.json": json.dumps(llama.hf_config(c))})
        return *split(from_pretrained(path, scan=scan)), optax.adamw(RATE, weight_decay=0.01)


def compiled(c: dict[str, Any], definition: Any, optimizer: Any, state: tuple[Any, Any]) -> Any:
    """Compile a step from ``(parameters, optimizer state, rows)`` to the first two and the loss."""
    import jax
    import jax.numpy as jnp
    import optax

    from dovetail_kernels import DenseMixer, linear_cross_entropy
    from dovetail_models import merge

    def loss(params: Any, tokens: Any) -> Any:
        model, inputs = merge(definition, params), tokens[:, :-1]
        positions = jnp.tile(jnp.arange(c["time"], dtype=jnp.int32), c["batch"])
        hidden, _, _ = model.hidden(inputs.reshape(-1), positions, DenseMixer.of(inputs))
        weight, bias, cap = model.unembedding()
        total = linear_cross_entropy(hidden, weight, tokens[:, 1:].reshape(-1), bias=bias, softcap=cap)
        return total / inputs.size

    def step(params: Any, state: Any, tokens: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    tokens = jax.ShapeDtypeStruct((c["batch"], c["time"] + 1), jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*state, tokens).compile()


def cases(rng: random.Random | None) -> list[Case]:
    """Scanned against unrolled, step and compilation, and the scanned step against transformers."""
    steps = {"d": 64, "ff": 16, "layers": 1, "time": 32, "batch": 2, "vocab": 64}
    configs = [MODEL, *(nearby(rng, MODEL, steps) for _ in range(3 if rng else 0))]
    return [case for config in configs for case in deep_cases(config)]


def deep_cases(c: dict[str, Any]) -> list[Case]:
    """The cases of one model."""
    sizes = "Llama d{d} L{layers} ff{ff} V{vocab} B{batch} T{time}".format(**c)
    scanned, unrolled, eager = (
        Contestant("ScannedStep", "ours"),
        Contestant("Step", "ours"),
        Contestant("Eager", "torch"),
    )
    compiling = Contestant("ScannedCompile", "ours"), Contestant("Compile", "ours")
    return [
        Case(f"step {sizes}, scanned/unrolled", c, pair=(scanned, unrolled)),
        Case(f"step {sizes}, scanned/eager", c, pair=(scanned, eager)),
        Case(f"step {sizes}, unrolled/eager", c, pair=(unrolled, eager)),
        Case(f"compile {sizes}", c, pair=compiling),
    ]
