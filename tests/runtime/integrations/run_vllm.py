"""Run models in vLLM, in a process of its own: python run_vllm.py '{"models": …}' > answers.jsonl.

vLLM binds threads, replaces functions of torch and warns of much; none of that is for a test run.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

EXACT = {"quantization_config": {"quant_method": "cvxq", "exact": True}}


def answers(model: str, order: dict[str, Any]) -> list[dict[str, Any]]:
    """Continue the prompts greedily; of their own tokens, log-probabilities, all but the first."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=model,
        dtype="float32",
        skip_tokenizer_init=True,
        hf_overrides=EXACT,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=order["eager"],
        tensor_parallel_size=order["ranks"],
        max_model_len=order["context"],
        max_num_seqs=4,
    )
    settings = SamplingParams(
        temperature=0,
        max_tokens=order["tokens"],
        prompt_logprobs=0,
        detokenize=False,
        ignore_eos=True,
    )
    prompts: Any = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    found = []
    for output in llm.generate(prompts, settings, use_tqdm=False):
        ids = output.prompt_token_ids
        scores = [
            of[token].logprob for of, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        ]
        found.append({"ids": [*output.outputs[0].token_ids], "log_probabilities": scores})
    del llm
    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    """Print a line for each model: its answers, or the error that came instead."""
    order = json.loads(sys.argv[1])
    if order["ranks"] > 1:  # which vLLM by itself puts on nodes of memory, a rank each
        allowed = sorted(os.sched_getaffinity(0))
        chosen = [str(allowed[rank % len(allowed)]) for rank in range(order["ranks"])]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(chosen))
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # ranks are processes that write to it, too
    for model in order["models"]:
        found: Any
        try:
            found = answers(model, order)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(json.dumps(found), file=told, flush=True)


if __name__ == "__main__":
    main()
