"""Runs inside this project's environment: what `spinquant.load` answers to the same questions, as JSON.

python answer_spinquant.py FOLDER QUESTIONS.json ANSWERS.json
"""

import json
import sys
from pathlib import Path

import torch

import spinquant


@torch.no_grad()
def main(folder: str, questions: str, answers: str) -> None:
    asked = json.loads(Path(questions).read_text())
    model = spinquant.load(folder)
    greedy = []
    for ids in asked["prompts"]:
        start = torch.tensor([ids])
        out = model.generate(start, max_new_tokens=asked["new_tokens"], min_new_tokens=asked["new_tokens"], do_sample=False)
        greedy.append(out[0, len(ids) :].tolist())
    logprobs = []
    for ids in asked["windows"]:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].to(torch.float64)
        chosen = torch.tensor(ids[1:]).unsqueeze(1)
        logprobs.append(logits.log_softmax(-1).gather(1, chosen).squeeze(1).tolist())
    Path(answers).write_text(json.dumps({"greedy": greedy, "logprobs": logprobs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
