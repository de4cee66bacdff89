"""Write the answers of `spinquant.load` as JSON, the reference for the clients; runs in this project's environment.

python answer_spinquant.py FOLDER QUESTIONS.json ANSWERS.json

`moved` are the log-probabilities after the embeddings were changed by one part in a million: they show how far answers
differ that are equal up to rounding.
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
    count = asked["new_tokens"]
    greedy = []
    for ids in asked["prompts"]:
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        greedy.append(out[0, len(ids) :].tolist())
    found = {"greedy": greedy, "logprobs": logprobs(model, asked["windows"])}
    embedding = model.get_input_embeddings().weight
    # Narrow dtypes cannot be moved by so little: there, by one unit in the last place.
    step = max(1e-6, torch.finfo(embedding.dtype).eps)
    noise = torch.rand(embedding.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    embedding.mul_((1 + step * noise).to(embedding.dtype))
    Path(answers).write_text(json.dumps({**found, "moved": logprobs(model, asked["windows"])}))


def logprobs(model, windows: list[list[int]]) -> list[list[float]]:
    """Log-probability of every token of a window except the first."""
    found = []
    for ids in windows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].to(torch.float64)
        chosen = torch.tensor(ids[1:]).unsqueeze(1)
        found.append(logits.log_softmax(-1).gather(1, chosen).squeeze(1).tolist())
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
