"""Small models and data for the tests of train."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dovetail_kernels import einsum, take
from dovetail_protocols import LMBatch, LossOutput, Term, split_rows
from dovetail_runtime import constrain


class TinyLM(nnx.Module):
    """One attention layer; its auxiliary loss is the squared hidden state, weighted by segments that exist."""

    def __init__(self, vocab=17, dim=8, *, rngs):
        self.vocab_size = vocab
        init = nnx.initializers.normal(0.5)
        self.embedding = nnx.Param(init(rngs.params(), (vocab, dim), jnp.float32))
        self.head = nnx.Param(init(rngs.params(), (dim, vocab), jnp.float32))

    def hidden(self, tokens, positions, mixer, *, embeds=None):
        x = take(self.embedding.get_value(), tokens)
        heads = x.reshape(x.shape[0], 2, -1)
        mixed, mixer = mixer.attend(0, heads, heads, heads, scale=0.5)
        h = constrain(x + mixed.reshape(x.shape), "tokens", "embed")
        live = (tokens % 3 != 0).astype(jnp.float32)
        return h, {"size": (jnp.sum(jnp.sum(h * h, -1) * live), jnp.sum(live))}, mixer

    def unembedding(self):
        return self.head.get_value(), None, None

    def unembed(self, hidden):
        return einsum("td,dv->tv", hidden, self.head.get_value())


class FarLM(TinyLM):
    """Its heads that look ahead add the embedding of the following token, times their number."""

    def look_ahead(self, hidden, following, positions, mixer, *, head=0):
        x = take(self.embedding.get_value(), following)
        return hidden + (head + 1) * x, {"size": (jnp.sum(x), jnp.float32(x.shape[0]))}, mixer


class SparseLM(TinyLM):
    """Two layers with four experts each, vectors of which a token adds the two that it scores best, weighted."""

    def __init__(self, vocab=17, dim=8, *, rngs):
        super().__init__(vocab, dim, rngs=rngs)
        self.experts = nnx.Param(nnx.initializers.normal(0.5)(rngs.params(), (2, 4, dim), jnp.float32))

    def hidden(self, tokens, positions, mixer, *, embeds=None):
        h, aux, mixer = super().hidden(tokens, positions, mixer, embeds=embeds)
        for layer, table in enumerate(self.experts.get_value()):
            scores = jax.nn.sigmoid(h @ table.T)
            best = jax.lax.top_k(scores, 2)[1]
            chosen, mixer = mixer.choose(layer, best)
            chosen = jnp.where(chosen < 0, best, chosen)
            h = h + jnp.sum(jnp.take_along_axis(scores, chosen, 1)[..., None] * table[chosen], axis=1)
        return h, aux, mixer


def tiny(seed=0, model=TinyLM):
    definition, state = nnx.split(model(rngs=nnx.Rngs(seed)))
    return definition, nnx.to_pure_dict(state)


def batch_of(step, rows=8, time=6, vocab=17) -> LMBatch:
    """A batch with packed documents and unequal masks, a function of the step."""
    rng = np.random.default_rng(step)
    segments = np.sort(rng.integers(0, 4, (rows, time + 1)), axis=1)
    weights = rng.integers(0, 2, (rows, time + 1)).astype(np.float32)
    weights[0] = 1
    segments[0] = 1
    return split_rows(rng.integers(0, vocab, (rows, time + 1)), segments, None, weights)


class Batches:
    """A loader: batch k is a function of k."""

    def __init__(self, end=None):
        self.step, self.end = 0, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.step == self.end:
            raise StopIteration
        self.step += 1
        return batch_of(self.step - 1)

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def quadratic(params, batch):
    """A linear model in closed form: weighted squared error, plus an auxiliary term with weights of its own."""
    error = batch["x"] @ params["w"] - batch["y"]
    aux = {
        "loss/size": Term(jnp.sum((batch["x"] @ params["w"]) ** 2 * batch["v"]), jnp.sum(batch["v"])),
        "bias": Term(jnp.sum(error), jnp.float32(error.shape[0])),
    }
    return LossOutput(jnp.sum(error**2 * batch["m"]), jnp.sum(batch["m"]), aux)


def regression(seed=0, rows=12):
    rng = np.random.default_rng(seed)
    batch = {
        "x": rng.normal(size=(rows, 3)),
        "y": rng.normal(size=rows),
        "m": rng.integers(0, 2, rows) * rng.random(rows),
        "v": rng.integers(0, 3, rows),
    }
    return jax.tree.map(lambda a: np.asarray(a, np.float32), batch), {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
