"""Write packages/engine/tests/golden: a tiny random Llama and transformers' greedy replies with all log-probabilities.

Run inside the oracle environment `hf` (torch 2.13.0, transformers 5.23): ``python make_generation.py``.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parents[3] / "packages/engine/tests/golden"
PROMPTS = (3, 40, 1, 6, 17, 2, 29, 8)
REPLY = 16
MARGIN = 0.02
CONFIG = transformers.LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_bias=True,
    eos_token_id=None,
    rope_parameters={
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    attn_implementation="eager",
)


def widen(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Draw parameters that make logits and their margins wide, and biases and norms that matter."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            values = rng.uniform(0.5, 1.5, parameter.shape)
        else:
            scale = 0.3 if name.endswith("bias") else 1.0 if "embed" in name else 1.3 * parameter.shape[1] ** -0.5
            values = rng.normal(0.0, scale, parameter.shape)
        parameter.data = torch.from_numpy(values.astype(np.float32))


def greedy(model: transformers.LlamaForCausalLM, prompt: list[int], ends: list[int] | None) -> list[int]:
    model.generation_config.eos_token_id = ends
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": REPLY, "pad_token_id": 0}
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


def logprobs(model: transformers.LlamaForCausalLM, prompt: list[int], reply: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).numpy()


def attempt(seed: int) -> tuple[transformers.LlamaForCausalLM, dict[str, np.ndarray]] | None:
    """Return a model and what it answers, or None where two tokens come so close that rounding could swap them."""
    rng = np.random.default_rng(seed)
    model = transformers.LlamaForCausalLM(CONFIG).float().eval()
    widen(model, rng)
    prompts = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in PROMPTS]
    replies = [greedy(model, prompt, None) for prompt in prompts]
    rows = np.stack([logprobs(model, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)])
    best = np.sort(rows, -1)
    if np.min(best[..., -1] - best[..., -2]) < MARGIN or min(len(set(reply)) for reply in replies) < 4:
        return None
    ends = [replies[0][9], replies[3][4]]
    lengths = [len(greedy(model, prompt, ends)) for prompt in prompts]
    arrays = {
        "prompts": np.concatenate(prompts).astype(np.int32),
        "prompt_lengths": np.asarray(PROMPTS, np.int32),
        "replies": np.asarray(replies, np.int32),
        "logprobs": rows,
        "ends": np.asarray(ends, np.int32),
        "lengths_with_ends": np.asarray(lengths, np.int32),
    }
    return model, arrays


def main() -> None:
    found = next(made for made in map(attempt, range(1000)) if made is not None)
    model, arrays = found
    model.generation_config.eos_token_id = None
    shutil.rmtree(OUT, ignore_errors=True)
    model.save_pretrained(OUT)
    np.savez_compressed(OUT / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
