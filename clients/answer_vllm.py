"""Write vLLM's greedy tokens and log-probabilities for a folder as JSON; runs in vLLM's environment.

python answer_vllm.py FOLDER QUESTIONS.json ANSWERS.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# One process, so that a failure ends it; little memory for the cache; nothing from the network.
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main(folder: str, questions: str, answers: str) -> None:
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(questions).read_text())
    llm = LLM(folder, dtype=asked["dtype"], max_model_len=512, enforce_eager=True, max_num_seqs=4)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True))
    windows = [{"prompt_token_ids": ids} for ids in asked["windows"]]
    scored = llm.generate(windows, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    found = {
        "rotated_attentions": llm.apply_model(count_rotated)[0],
        "greedy": [list(output.outputs[0].token_ids) for output in greedy],
        "logprobs": [
            [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(asked["windows"], scored, strict=True)
        ],
    }
    Path(answers).write_text(json.dumps(found))


def count_rotated(model: Any) -> int:
    """Number of attention layers in which our plugin rotates queries and keys; the logits do not depend on it."""
    hooks = [[type(hook).__name__ for hook in module._forward_pre_hooks.values()] for module in model.modules()]
    return sum("_QueryKeyRotation" in names for names in hooks)


if __name__ == "__main__":
    main(*sys.argv[1:])
