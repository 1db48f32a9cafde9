"""The requests and the model of the serving benchmarks, and when two systems' replies count as the same."""

import json

import engine
import llama
import numpy as np
import pytest
import workload

LOAD = {"requests": 200, "prompt": 128, "output": 64, "seed": 3, "vocab": 50}
SMALL = {"d": 128, "layers": 2, "heads": 2, "kv_heads": 1, "ff": 64, "vocab": 512, "time": 64}


def test_lengths_are_those_named():
    """Prompts of 16 to 128 and outputs of 16 to 64; token 0 is never in a prompt; a seed repeats."""
    jobs = workload.jobs(LOAD)
    prompts, outputs = [len(job.prompt) for job in jobs], [job.output for job in jobs]
    assert (min(prompts) in range(16, 22), max(prompts) in range(123, 129)) == (True, True)
    assert (min(outputs) in range(16, 19), max(outputs) in range(62, 65)) == (True, True)
    assert {token for job in jobs for token in job.prompt} == set(range(1, 50))
    assert workload.jobs(LOAD) == jobs != workload.jobs({**LOAD, "seed": 4})


def replies(tokens, margins=None):
    return {"tokens": tokens, "margins": margins or [[1.0] * len(reply) for reply in tokens]}


PEER = replies([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


@pytest.mark.parametrize(
    ("ours", "peer", "message"),
    [
        ([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], PEER, None),
        ([[1, 2, 3, 4, 5], [6, 7, 8, 9, 11]], PEER, "reply 1, token 4: 11 against 10, which leads by 1"),
        ([[1, 2, 3, 4], [6, 7, 8, 9, 10]], PEER, "reply 0 has 4 tokens against 5"),
        ([[1, 2, 3, 4, 5]], PEER, "1 replies against 2"),
        ([[1, 2, 3, 4, 0], [6, 7, 8, 9, 10]], replies(PEER["tokens"], [[1.0] * 4 + [9e-4], [1.0] * 5]), None),
        ([[0, 0, 0, 0, 0], [6, 7, 8, 9, 10]], replies(PEER["tokens"], [[0.0] * 5, [1.0] * 5]), "only 50%"),
        ([[0, 2, 3, 4, 5], [6, 7, 8, 9, 10]], replies(PEER["tokens"], [[float("nan")] * 5, [1.0] * 5]), "only 50%"),
    ],
)
def test_tokens_must_agree_until_the_choice_is_close(ours, peer, message):
    """Rounding may decide between two equal logits; everything else is another model."""
    found = workload.same_tokens({"tokens": ours}, peer)
    assert (found is None) if message is None else (message in found)


def test_texts_must_agree_but_for_a_few():
    """Over HTTP the margins are not known: a near tie in one of ten is allowed, a missing token is not."""
    peer = {"tokens": [2] * 10, "texts": [f" w{i}" for i in range(10)]}
    assert workload.same_texts(peer, peer) is None
    assert workload.same_texts({**peer, "texts": ["x", *peer["texts"][1:]]}, peer) is None
    assert "2 of 10 texts differ; number 0: 'x'" in workload.same_texts(
        {**peer, "texts": ["x", "y", *peer["texts"][2:]]}, peer
    )
    assert "tokens against" in workload.same_texts({**peer, "tokens": [2] * 9 + [1]}, peer)


def test_the_model_has_the_named_size():
    assert llama.parameters(engine.MODEL) == pytest.approx(12.6e6, rel=0.01)


def test_the_directory_is_a_model_and_a_tokenizer(tmp_path, monkeypatch):
    """All readers must see the same weights and words; a directory of another recipe is written anew."""
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    from dovetail_kernels import DenseMixer
    from dovetail_models import from_pretrained
    from dovetail_text import Tokenizer

    monkeypatch.setattr(llama, "FOLDER", tmp_path / "model")
    path = llama.directory(SMALL)
    written = load_file(path / "model.safetensors")
    expected = llama.weights(SMALL, None)
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[name], expected[name]) for name in expected)
    model = from_pretrained(path)
    tokens = jnp.arange(1, 40)[None]
    hidden, _, _ = model.hidden(tokens[0], jnp.arange(39), DenseMixer.of(tokens))
    logits = np.asarray(model.unembed(hidden))
    best = np.sort(logits, axis=-1)
    assert logits.argmax(-1).min() > 0
    assert np.median(best[:, -1] - best[:, -2]) > 0.3
    tokenizer = Tokenizer.from_pretrained(path)
    assert tokenizer.vocab_size == SMALL["vocab"]
    assert tokenizer.decode([300, 301]) == " w300 w301"
    assert tokenizer.decode(tokenizer.encode("Plain text, 1+1.")) == "Plain text, 1+1."
    stamp = (path / "config.json").stat().st_mtime_ns
    assert llama.directory(SMALL) == path
    assert (path / "config.json").stat().st_mtime_ns == stamp
    llama.directory({**SMALL, "layers": 1})
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 1
