"""A small model with wide margins between its best and second-best tokens, and its plain greedy continuation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dovetail_kernels import DenseMixer
from dovetail_models import Llama, LlamaConfig, merge, split
from dovetail_protocols import FullCache
from dovetail_protocols.testing.recurrence import Fading

VOCAB = 61
MARGIN = 1e-3


@functools.cache
def tiny(layers=2, seed=0):
    """Return (build, params) of a Llama with grouped heads whose weights are large."""
    config = LlamaConfig(
        vocab_size=VOCAB, features=32, hidden=48, layers=layers, heads=4, kv_heads=2, init_std=0.4, max_position=128
    )
    definition, params = split(Llama(config, rngs=nnx.Rngs(seed)))
    return functools.partial(merge, definition), params


class Hybrid:
    """A recurrent layer, one that attends, and a recurrent one again."""

    vocab_size = VOCAB

    def __init__(self, params):
        self.params = params

    def hidden(self, tokens, positions, mixer, *, embeds=None):
        x = self.params["embedding"][tokens] if embeds is None else embeds
        for layer in range(3):
            inner = jnp.einsum("td,de->te", jnp.tanh(x), self.params["inner"][layer])
            if layer == 1:
                heads = inner.reshape(len(x), 2, -1)
                out, mixer = mixer.attend(layer, heads, heads, heads, scale=1.0)
            else:
                gate = jax.nn.sigmoid(inner[:, 0])
                out, mixer = mixer.recur(layer, Fading(*self.params["fading"][layer]), (inner, gate))
            x = x + out.reshape(x.shape)
        return x, {}, mixer

    def unembed(self, hidden):
        return hidden @ self.params["embedding"].T

    def unembedding(self):
        return self.params["embedding"].T, None, None

    def cache_specs(self):
        recurrent = Fading(*self.params["fading"][0]).cache_spec()
        return recurrent, FullCache(2, 8, 8), recurrent


@functools.cache
def hybrid():
    """Return (build, params) of a Hybrid."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (VOCAB, 16), "inner": (3, 16, 16), "fading": (3, 2, 16)}
    return Hybrid, {name: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32) for name, shape in shapes.items()}


class Letters:
    """A tokenizer of one character per id; 0 ends a reply."""

    vocab_size = VOCAB
    eos_ids = (0,)
    fingerprint = "letters"

    def encode(self, text):
        return [ord(c) - 64 for c in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids if i)

    def decoder(self):
        return _Decoder()

    def chat(self, messages, tools=None, *, add_generation_prompt=False):
        raise ValueError("no template")


class _Decoder:
    def push(self, ids):
        return Letters().decode(ids)

    def flush(self):
        return ""


@functools.cache
def _logprobs(build):
    def run(params, tokens):
        model = build(params)
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        hidden, _, _ = model.hidden(tokens, positions, DenseMixer.of(tokens[None], implementation="reference"))
        return jax.nn.log_softmax(model.unembed(hidden).astype(jnp.float32))

    return jax.jit(run)


def teacher(tokens, build=None, params=None):
    """Return the log-probabilities ``[tokens, vocab]`` of the plain forward, each row for the token after it."""
    if build is None:
        build, params = tiny()
    padded = np.zeros(128, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_logprobs(build)(params, padded))[: len(tokens)]


def check_greedy(prompt, done, build=None, params=None):
    """Compare a greedy reply with the plain forward; return how many of its positions could be compared.

    Log-probabilities agree at every position; tokens up to the first place where the two best are too close to call.
    """
    tokens = [*prompt, *done.token_ids]
    rows = teacher(tokens, build, params)[len(prompt) - 1 : -1]
    close = [i for i, row in enumerate(np.sort(rows, -1)) if row[-1] - row[-2] < MARGIN]
    compared = close[0] if close else len(rows)
    assert list(done.token_ids[:compared]) == rows.argmax(-1)[:compared].tolist()
    if done.logprobs is not None:
        got = [entry.value for entry in done.logprobs]
        np.testing.assert_allclose(got, rows[np.arange(len(rows)), done.token_ids], atol=1e-4)
    return compared
