"""Replies of `dovetail_engine` against `generate` of transformers: tokens, log-probabilities, alternatives, ends."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, load_theirs, random_config, widened

from dovetail_engine import Engine, EngineOptions, load_engine
from dovetail_models import from_pretrained, merge, split
from dovetail_protocols import Completion, Request, SamplingParams
from dovetail_text import train_bpe

LENGTH, REPLY, MARGIN, TOLERANCE = 64, 24, 1e-3, 1e-4
PROMPTS = (3, 40, 1, 6, 17, 2, 29, 8)
COMMON = {"max_length": LENGTH, "page_size": 4}
SCHEDULES = {
    "preempted": {"chunk_tokens": 16, "max_running": 4, "decode_steps": 8, "cache_tokens": LENGTH},
    "alone": {"chunk_tokens": 64, "max_running": 1, "decode_steps": 1},
    "small chunks": {"chunk_tokens": 7, "max_running": 4, "decode_steps": 1, "page_size": 1},
    "together": {"chunk_tokens": 64, "max_running": 4, "decode_steps": 8},
}
SEEDS = (0, 1, 2, 3, 5, 8, 9, 17)
CASES = [("llama", seed, tuple(SCHEDULES) if not i else (tuple(SCHEDULES)[i % 4],)) for i, seed in enumerate(SEEDS)]
OTHERS = {
    "deepseek_v2": 3,
    "deepseek_v3": 3,
    "gemma2": 1,
    "gemma3": 2,
    "glm4_moe": 2,
    "gpt2": 2,
    "gpt_oss": 2,
    "mamba2": 2,
    "mistral": 6,
    "mixtral": 2,
    "olmo2": 4,
    "olmo3": 2,
    "phi3": 2,
    "qwen2": 0,
    "qwen3": 0,
    "qwen3_moe": 2,
    "qwen3_next": 0,
    "smollm3": 4,
}
CASES += [(family, seed, tuple(SCHEDULES)[1:3]) for family, seed in OTHERS.items()]


@dataclasses.dataclass
class Reference:
    """A model of transformers and its greedy replies to some prompts, ends of text ignored."""

    model: transformers.PreTrainedModel
    prompts: list[list[int]]
    replies: list[list[int]]

    @classmethod
    def of(cls, model: transformers.PreTrainedModel, *, seed: int, lengths: Sequence[int]) -> "Reference":
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, model.config.vocab_size, length).tolist() for length in lengths]
        return cls(model, prompts, [greedy(model, prompt, None) for prompt in prompts])


def greedy(model: transformers.PreTrainedModel, prompt: list[int], ends: int | list[int] | None) -> list[int]:
    """Return what transformers answers, the end token included; its cache is wrong for windows of 1."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = ends
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=REPLY, pad_token_id=0, use_cache=False
    )
    return out[0, len(prompt) :].tolist()


def logprobs(model: transformers.PreTrainedModel, prompt: list[int], reply: Sequence[int]) -> np.ndarray:
    """Return transformers' log-probabilities ``[len(reply), vocab]`` of each token of a reply, teacher-forced."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).numpy()


def check_logprobs(rows: np.ndarray, done: Completion, alternatives: int) -> None:
    """The chosen token's value and the likeliest others', at every position of our own reply."""
    assert done.logprobs is not None
    assert len(done.logprobs) == len(done.token_ids) == len(rows)
    for row, token, entry in zip(rows, done.token_ids, done.logprobs, strict=True):
        np.testing.assert_allclose(entry.value, row[token], atol=TOLERANCE)
        ids = list(entry.top)
        assert len(ids) == min(alternatives, len(row) - 1)
        assert token not in ids
        np.testing.assert_allclose(list(entry.top.values()), row[ids], atol=TOLERANCE)
        assert list(entry.top.values()) == sorted(entry.top.values(), reverse=True)
        others = np.delete(row, [token, *ids])
        assert not others.size or row[ids].min() >= others.max() - TOLERANCE  # nothing likelier was left out


def check_tokens(rows: np.ndarray, expected: Sequence[int], got: Sequence[int]) -> int:
    """Compare up to the first position whose two best are too close to call (`rows` follow the expected tokens)."""
    best = np.sort(rows, -1)
    close = np.flatnonzero(best[:, -1] - best[:, -2] < MARGIN)
    compared = int(close[0]) if close.size else len(expected)
    assert list(got[:compared]) == list(expected[:compared])
    return compared


@pytest.mark.parametrize(("family", "seed", "names"), CASES, ids=lambda x: "" if isinstance(x, tuple) else str(x))
def test_every_schedule_answers_as_transformers(family: str, seed: int, names: tuple[str, ...], tmp_path: Path) -> None:
    """A checkpoint made there is answered otherwise here, for some architecture, batch, chunk size or preemption."""
    config = random_config(seed, family)
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = max(config.max_position_embeddings, LENGTH)
    model = widened(config, seed)
    model.save_pretrained(tmp_path)
    reference = Reference.of(load_theirs(tmp_path), seed=seed, lengths=PROMPTS)
    definition, params = split(from_pretrained(tmp_path))
    how = SamplingParams(max_tokens=REPLY, temperature=0.0, logprobs=5)
    for name in names:
        options = EngineOptions(**(COMMON | SCHEDULES[name]))
        with Engine(functools.partial(merge, definition), params, options=options) as engine:
            replies = engine.generate([Request(prompt=prompt, sampling=how) for prompt in reference.prompts])
            assert (engine.stats()["preemptions"] > 0) == (name == "preempted")
        check(reference, replies, f"{family} {seed}, {name}")


def test_the_configurations_differ_in_what_matters() -> None:
    """Another drawing of configurations, or a new family, leaves a feature of the architecture untested."""
    assert {*OTHERS, "llama"} == set(FAMILIES)
    configs = [random_config(seed) for seed in SEEDS]
    assert {c.rope_parameters["rope_type"] for c in configs} == {"default", "linear", "llama3", "yarn"}
    groups = {c.num_attention_heads // c.num_key_value_heads for c in configs if c.num_key_value_heads > 1}
    assert groups >= {2}
    assert any(c.num_key_value_heads == 1 < c.num_attention_heads for c in configs)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert {getattr(c, name) for c in configs} == {False, True}, name


def check(reference: Reference, replies: Sequence[Completion], case: str) -> None:
    compared = 0
    for prompt, expected, done in zip(reference.prompts, reference.replies, replies, strict=True):
        assert (done.finish_reason, len(done.token_ids)) == ("length", REPLY)
        check_logprobs(logprobs(reference.model, prompt, done.token_ids), done, 5)
        compared += check_tokens(logprobs(reference.model, prompt, expected), expected, done.token_ids)
    total = REPLY * len(replies)
    print(f"{case}: {compared} of {total} positions compared")
    assert compared >= 0.9 * total


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference, list[int]]:
    """A directory with tokenizer whose end tokens do come up in greedy replies, and the replies without ends."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["to be or not to be, that is the question; süße Grüße 日本 🙂\n"] * 3, 290)
    tokenizer.save_pretrained(folder)
    config = random_config(2)
    config.vocab_size, config.max_position_embeddings, config.eos_token_id = tokenizer.vocab_size, LENGTH, None
    widened(config, 2).save_pretrained(folder)
    reference = Reference.of(load_theirs(folder), seed=2, lengths=PROMPTS)
    ends = [reference.replies[0][9], reference.replies[3][4], reference.replies[5][0]]
    generation = transformers.GenerationConfig.from_pretrained(folder)
    generation.eos_token_id = ends
    generation.save_pretrained(folder)
    return folder, reference, ends


def test_ends_of_text_are_those_of_the_directory(opened: tuple[Path, Reference, list[int]]) -> None:
    """The ids of generation_config.json are ignored, only the first counts, or the reply lacks its end token."""
    folder, reference, ends = opened
    options = EngineOptions(**(COMMON | SCHEDULES["together"]))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    how = SamplingParams(max_tokens=REPLY, temperature=0.0)
    with load_engine(folder, options=options) as engine:
        replies = engine.generate([Request(prompt=prompt, sampling=how) for prompt in reference.prompts])
        plain = dataclasses.replace(how, ignore_eos=True)
        endless = engine.generate([Request(prompt=prompt, sampling=plain) for prompt in reference.prompts])
        by_id = dataclasses.replace(plain, stop_token_ids=tuple(ends[1:]))
        stopped = engine.generate([Request(prompt=prompt, sampling=by_id) for prompt in reference.prompts])
    assert [list(done.token_ids) for done in endless] == reference.replies
    cut = 0
    for prompt, done, other in zip(reference.prompts, replies, stopped, strict=True):
        expected = greedy(reference.model, prompt, ends)
        assert list(done.token_ids) == expected
        assert done.finish_reason == ("stop" if expected[-1] in ends else "length")
        text = expected[:-1] if expected[-1] in ends else expected
        assert done.text == theirs.decode(text, skip_special_tokens=True)
        assert list(other.token_ids) == greedy(reference.model, prompt, ends[1:])
        cut += len(expected) < REPLY
    assert cut >= 3


def test_one_end_token_in_the_configuration_alone(opened: tuple[Path, Reference, list[int]]) -> None:
    """An end that comes as the last allowed token is a length, or one id that is no list is not understood."""
    _, reference, ends = opened
    definition, params = split(from_pretrained(opened[0]))
    expected = greedy(reference.model, reference.prompts[0], ends[0])
    assert expected[-1] == ends[0]
    exact = SamplingParams(max_tokens=len(expected), temperature=0.0, stop_token_ids=(ends[0],))
    short = dataclasses.replace(exact, max_tokens=len(expected) - 1)
    options = EngineOptions(**(COMMON | SCHEDULES["alone"]))
    with Engine(functools.partial(merge, definition), params, options=options) as engine:
        whole, part = engine.generate([Request(prompt=reference.prompts[0], sampling=how) for how in (exact, short)])
    assert (list(whole.token_ids), whole.finish_reason) == (expected, "stop")
    assert (list(part.token_ids), part.finish_reason) == (expected[:-1], "length")
