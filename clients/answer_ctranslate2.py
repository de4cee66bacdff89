"""Convert a plain folder with CTranslate2 and write its answers as JSON; runs in CTranslate2's environment.

python answer_ctranslate2.py FOLDER QUESTIONS.json ANSWERS.json
"""

import json
import sys
import tempfile
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter


def main(folder: str, questions: str, answers: str) -> None:
    asked = json.loads(Path(questions).read_text())
    with tempfile.TemporaryDirectory() as place:
        TransformersConverter(folder).convert(f"{place}/converted", force=True)
        vocabulary = json.loads(Path(f"{place}/converted/vocabulary.json").read_text())
        generator = ctranslate2.Generator(f"{place}/converted", compute_type="float32")
    prompts = [[vocabulary[i] for i in ids] for ids in asked["prompts"]]
    results = generator.generate_batch(
        prompts,
        max_length=asked["new_tokens"],
        min_length=asked["new_tokens"],
        beam_size=1,
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    windows = [[vocabulary[i] for i in ids] for ids in asked["windows"]]
    scored = generator.score_batch(windows)
    found = {
        "greedy": [result.sequences_ids[0] for result in results],
        "logprobs": [result.log_probs for result in scored],
    }
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
