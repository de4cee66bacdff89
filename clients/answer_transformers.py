"""Write the answers of transformers as JSON; runs in an environment with transformers and compressed-tensors only.

python answer_transformers.py FOLDER QUESTIONS.json ANSWERS.json
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(folder: str, questions: str, answers: str) -> None:
    assert "spinquant" not in sys.modules
    asked = json.loads(Path(questions).read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    count = asked["new_tokens"]
    greedy, logprobs = [], []
    for ids in asked["prompts"]:
        start = torch.tensor([ids])
        out = model.generate(start, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        greedy.append(out[0, len(ids) :].tolist())
    for ids in asked["windows"]:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].to(torch.float64)
        chosen = torch.tensor(ids[1:]).unsqueeze(1)
        logprobs.append(logits.log_softmax(-1).gather(1, chosen).squeeze(1).tolist())
    Path(answers).write_text(json.dumps({"greedy": greedy, "logprobs": logprobs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
