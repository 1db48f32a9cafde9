"""States of recurrent layers: cut, padded, handed on from step to step, and computed again where they are lost."""

import jax.numpy as jnp
import numpy as np
import pytest
from engine_toys import check_greedy, hybrid
from test_equality import SCHEDULES, requests

from dovetail_engine.states import PIECE, Pieces, run_pieces
from dovetail_protocols import Request, SamplingParams
from dovetail_protocols.testing.recurrence import Fading


def alone(kernel, state, x, gate):
    """Return outputs and state of one sequence, a token at a time."""
    outs = []
    for t in range(len(x)):
        out, state = kernel.step(state, (x[None, t], gate[None, t]))
        outs.append(out[0])
    return np.stack(outs), state


@pytest.mark.parametrize("lengths", [[PIECE + 6, 5, PIECE, 1], [3], [2 * PIECE]], ids=str)
def test_pieces_are_sequences_of_their_own(lengths):
    """A piece sees its neighbour or what lies beyond, a state is lost between two, or an old one is found in a slot."""
    rng = np.random.default_rng(0)
    kernel = Fading(*(jnp.asarray(rng.standard_normal(3), jnp.float32) for _ in range(2)))
    tokens, total = 3 * PIECE, sum(lengths)
    x, gate = rng.standard_normal((tokens, 3)), rng.uniform(0.5, 1, tokens)
    x[total:] = np.nan
    x, gate = jnp.asarray(x, jnp.float32), jnp.asarray(gate, jnp.float32)
    slots = [4, 2, 7, 1][: len(lengths)]
    pool = {name: jnp.full((9, *shape), jnp.nan) for name, shape in kernel.cache_spec().state}
    held = {name: jnp.asarray(rng.standard_normal((1, *p.shape[1:])), jnp.float32) for name, p in pool.items()}
    pool = {name: p.at[slots[0]].set(held[name][0]) for name, p in pool.items()}  # the first one goes on
    starts = np.cumsum([0, *lengths]).tolist()
    chunks = [(at, n, slot, i > 0) for i, (at, n, slot) in enumerate(zip(starts, lengths, slots, strict=False))]
    pieces = Pieces.blank(tokens, 4, 2).cut(tokens, chunks)
    assert int(pieces.used) == sum(-(-n // PIECE) for n in lengths)
    outs, after = run_pieces(kernel, pool, (x, gate), Pieces(*map(jnp.asarray, pieces)))
    for i, (at, n, slot, fresh) in enumerate(chunks):
        state = {name: 0 * value for name, value in held.items()} if fresh else held
        expected, state = alone(kernel, state, x[at : at + n], gate[at : at + n])
        np.testing.assert_allclose(outs[at : at + n], expected, atol=1e-6, err_msg=str(i))
        for name in state:
            np.testing.assert_allclose(after[name][slot], state[name][0], atol=1e-6)
    others = [slot for slot in range(9) if slot not in slots]
    assert all(np.isnan(p[jnp.asarray(others)]).all() for p in after.values())


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["seven tokens per chunk", "many steps", "preemption amid chunks"])
def test_a_schedule_changes_no_token(name, make_engine):
    """A state is another request's, misses a token, has one twice, or survives a preemption."""
    engine = make_engine(*hybrid(), **SCHEDULES[name])
    asked = requests(8, longest=8, reply=40) if name.startswith("preemption") else requests(8)
    compared = [check_greedy(r.prompt, done, *hybrid()) for r, done in zip(asked, engine.generate(asked), strict=True)]
    assert sum(compared) >= 0.9 * sum(r.sampling.max_tokens for r in asked)
    assert (engine.stats()["preemptions"] > 0) == name.startswith("preemption")


def test_a_step_that_fails_late_spoils_no_state(make_engine):
    """The states had their token already; tried again without the chunk they get it twice."""
    engine = make_engine(*hybrid(), decode_steps=1)
    call, prompts = engine._runner._call, []

    def late(params, key, batch):
        sampled = call(params, key, batch)
        if key[0] == "mixed" and prompts:
            prompts.clear()
            raise RuntimeError("lost on its way")
        return sampled

    engine._runner._call = late
    how = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, logprobs=0)
    prompt = list(range(1, 9))
    with engine.submit(Request(prompt=prompt, sampling=how)) as stream:
        first = next(stream)
        prompts.append(True)
        failed = engine.generate([Request(prompt=[1], sampling=how)])[0]
        done = type(failed).join([first, *stream])
    assert (failed.finish_reason, done.finish_reason) == ("error", "length")
    assert check_greedy(prompt, done, *hybrid()) > 10


def test_a_model_that_never_looks_back_needs_one_size_of_context(make_engine):
    """Programs are compiled for contexts that no layer reads."""

    class Recurrent(hybrid()[0]):
        def hidden(self, tokens, positions, mixer, *, embeds=None):
            x = self.params["embedding"][tokens]
            out, mixer = mixer.recur(0, Fading(*self.params["fading"][0]), (x, jnp.abs(jnp.tanh(x[:, 0]))))
            return x + out, {}, mixer

        def cache_specs(self):
            return super().cache_specs()[:1]

    params = hybrid()[1]
    engine = make_engine(Recurrent, params, max_length=300, chunk_tokens=16, max_running=1, page_size=20)
    assert {key[2] for key in engine.programs} == {0, 300}
    asked = requests(2)
    for request, done in zip(asked, engine.generate(asked), strict=True):
        assert check_greedy(request.prompt, done, Recurrent, params)
