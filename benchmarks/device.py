"""Check on a device what the test-suite checks on the CPU: every step runs there, and gives what it gives on the CPU.

Tiny random models in float64 (biases, grouped heads, norms of queries and keys) are rotated, learned, quantized, tuned,
evaluated and saved, on the device and on the CPU, and the commands run on a folder. A check prints what it compared;
all of them run, and the script fails if one does.

    python benchmarks/device.py --device cuda             # a minute
    python benchmarks/device.py --device cuda --model gemma-3-270m       # the commands on this model of `models.py`

A code that lies within rounding noise of the middle between two may differ, and GPTQ, tuning and learning then go
another way: noise of 6e-8 in the norms, which transformers computes in float32, moves the logits of these models by up
to 26 % on one CPU. What such noise leaves is compared instead: the error against the full-precision model, which it
moves by at most 0.7 %, the losses of learning (0.2 %), and the codes that GPTQ gives for one weight (none differs).
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

import spinquant
from spinquant.calibration.blockwise import METHODS as ROUNDING
from spinquant.quantization.integer import dequantize

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
    ),
}
TOKENS = torch.randint(0, 128, (40, 24), generator=torch.Generator().manual_seed(1))
# Relative differences: of the same numbers in float64, of norms that transformers computes in float32, of models in
# which a code differs here and there, of their errors if one code changes those of later weights, and of KL after
# learning went another way.
SAME, ROUNDED, CLOSE, ERROR, LEARNED = 1e-9, 1e-5, 1e-2, 2e-2, 0.2
SCHEMES = ("W4A4KV4", "W4g32A8KV8", "NVFP4", "MXFP4", "FP8_DYNAMIC")

Check = Callable[[], str]


def tiny(name: str, device: str) -> Any:
    """A random model in float64 with gains and biases that are neither one nor zero."""
    generator = torch.Generator().manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name]()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model.to(device)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    device = next(model.parameters()).device
    return model(input_ids=TOKENS[:4].to(device), use_cache=False).logits.cpu()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def spec_for(name: str) -> spinquant.RotationSpec:
    """All rotations that the model allows."""
    plan = spinquant.plan_of(tiny(name, "cpu"))
    names = [one for one in ("R1", "R2", "R3", "R4") if one not in dict(plan.refused) and plan.spaces_of(one)]
    return spinquant.RotationSpec(tuple(names))


def quantized(name: str, device: str, scheme: str, method: str, **options: Any) -> Any:
    """The result of `quantize`, calibrated and with clip ratios searched unless that has no effect."""
    clips = "KV" in scheme
    calibrated = clips or method != "rtn"
    return spinquant.quantize(
        tiny(name, device),
        scheme,
        options.pop("spec", None) or spec_for(name),
        method=method,
        tokens=TOKENS if calibrated else None,
        calibration=spinquant.Calibration(clips=clips) if calibrated else None,
        options=spinquant.Options(prove=False),
        **options,
    )


def compared(what: str, found: float, bound: float) -> str:
    """What was found, if it is within the bound. Raises AssertionError if not."""
    if not found <= bound:
        raise AssertionError(f"{what} {found:.2e}, expected at most {bound:g}")
    return f"{what} {found:.1e}"


def checks_of(name: str, device: str) -> Iterator[tuple[str, Check]]:
    """Checks of one tiny model, by name."""
    learned: dict[str, Any] = {}

    def rotate() -> str:
        model = tiny(name, device)
        before = logits(model)
        spinquant.rotate(model, spec_for(name))
        return compared("logits moved by", relative(logits(model), before), ROUNDED)

    def quantize(scheme: str, method: str, **options: Any) -> str:
        results = [quantized(name, d, scheme, method, **options) for d in ("cpu", device)]
        here, there = (logits(result.model) for result in results)
        moved = relative(there, here)
        if method == "rtn":
            return compared("from the CPU by", moved, CLOSE)
        exact, also = (relative(found, logits(tiny(name, d))) for found, d in ((here, "cpu"), (there, device)))
        found = [compared("error from that on the CPU by", abs(also / exact - 1), ERROR), f"logits by {moved:.1e}"]
        if "tune" in options:
            kl, on_device = (result.record()["tuning"]["kl"] for result in results)
            found += [compared(f"KL {when} by", abs(on_device[when] / kl[when] - 1), ERROR) for when in kl]
        return ", ".join(found)

    def round_one(**options: Any) -> str:
        """GPTQ of one weight from the same numbers: what differs is a row at most, behind a flipped code."""
        weight = tiny(name, "cpu").model.layers[0].mlp.down_proj.weight.detach()
        generator = torch.Generator().manual_seed(2)
        x, noise = (torch.randn(256, weight.shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
        found = []
        for d in ("cpu", device):
            moments = spinquant.Moments()
            moments.add(x.to(d), (x + 0.1 * noise).to(d))
            quantizer = spinquant.parse_scheme("W4g32A8KV8").weights
            assert quantizer is not None
            packed = spinquant.gptq(weight.to(d), moments, quantizer, spinquant.GPTQOptions(**options))
            found.append(dequantize(packed).cpu())
        differ = (found[1] - found[0]).abs() > SAME * weight.abs().max()
        return compared("share of numbers that differ", float(differ.double().mean()), 1 / len(weight))

    def learn(method: Any, transforms: bool | None = None, **local: Any) -> str:
        options = spinquant.LearnOptions(
            method,
            baselines=2,
            transforms=transforms,
            local=spinquant.LocalOptions(steps=8, rows=128, **local),
            end_to_end=spinquant.EndToEndOptions(steps=4, batch=2),
        )
        scheme = spinquant.parse_scheme("W4A4KV4")
        found = [
            spinquant.learn(tiny(name, d), scheme, spec_for(name), TOKENS[:24], TOKENS[26:], options)
            for d in ("cpu", device)
        ]
        learned.setdefault(method, found[1])
        here, there = ({key: score["kl"] for key, score in one.record["scores"].items()} for one in found)
        if here.keys() != there.keys():
            raise AssertionError(f"candidates on the CPU {sorted(here)}, on the device {sorted(there)}")
        shares = {key: abs(there[key] - here[key]) / max(here[key], 1e-9) for key in here if key != "16-bit"}
        fixed = [key for key in shares if method in ("random", "closed-form") or key.startswith("random")]
        kl = [compared("KL from the CPU by", max(shares[key] for key in fixed), CLOSE)]
        if others := shares.keys() - set(fixed):
            kl.append(compared("after learning by", max(shares[key] for key in others), LEARNED))
        curves = [one.record.get("local_steps", {}) for one in found]
        if curves[0].keys() != curves[1].keys():
            raise AssertionError(f"learned on the CPU {sorted(curves[0])}, on the device {sorted(curves[1])}")
        pairs = [pair for space in curves[0] for pair in zip(curves[0][space], curves[1][space], strict=True)]
        if pairs:
            kl.append(compared("losses by", max(abs(other / loss - 1) for loss, other in pairs), CLOSE))
        return f"{found[1].kept}; " + ", ".join(kl)

    def save() -> str:
        result = quantized(name, device, "W4A4KV4", "gptaq")
        with tempfile.TemporaryDirectory() as folder:
            spinquant.save(result, Path(folder) / "saved")
            loaded = spinquant.load(Path(folder) / "saved", device=device)
        return compared("loaded logits differ by", relative(logits(loaded), logits(result.model)), SAME)

    def generate() -> str:
        model = quantized(name, device, "W4A4KV4", "rtn").model
        start = TOKENS[:2, :8].to(device)
        found = model.generate(start, max_new_tokens=12, do_sample=False, pad_token_id=0)
        again = start
        for _ in range(12):  # without a cache
            again = torch.cat([again, model(input_ids=again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return compared("tokens that a packed cache changes:", float((found != again).sum()), 0)

    def evaluate() -> str:
        here, there = (spinquant.evaluate(tiny(name, d), TOKENS).perplexity for d in ("cpu", device))
        return compared("perplexity from the CPU by", abs(math.log(there / here)), ROUNDED)

    yield "rotate", rotate
    yield "evaluate", evaluate
    for scheme in SCHEMES:
        for method in ROUNDING if scheme.startswith("W4") else ("rtn",):
            yield f"quantize {scheme} {method}", lambda scheme=scheme, method=method: quantize(scheme, method)
    yield "gptq of one weight", round_one
    yield "gptq of one weight, act order", lambda: round_one(act_order=True)
    yield "gptaq of one weight", lambda: round_one(asymmetry=0.25)
    for method in ("random", "closed-form", "local", "end-to-end"):
        yield f"learn {method}", lambda method=method: learn(method)
    for solver in ("qr", "procrustes"):
        yield f"learn local {solver}", lambda solver=solver: learn("local", transforms=False, solver=solver)
    yield (
        "quantize what was learned",
        lambda: quantize("W4A4KV4", "gptaq", spec=learned["local"].spec, rotations=learned["local"].rotations),
    )
    yield "tune", lambda: quantize("W4A4KV4", "gptaq", tune=spinquant.TuneOptions(steps=4, windows=4))
    yield "save and load", save
    yield "generate", generate


def commands(folder: str, device: str, scratch: Path) -> Iterator[tuple[str, Check]]:
    """The commands on a model's folder, with little text."""
    few = ["--samples", "8", "--sample-length", "256"]
    best = ["--method", "gptaq", "--clips", "--tune", "4", *few]
    calls = {
        "learn": [
            folder,
            "learned",
            "--scheme",
            "W4A4KV4",
            "--method",
            "local",
            "--steps",
            "20",
            "--windows",
            "2",
            *few,
        ],
        "rotate": [folder, "rotated"],
        "quantize": [folder, "rtn", "--scheme", "W4A16", "--method", "rtn"],
        "quantize --learned": [folder, "best", "--scheme", "W4A4KV4", "--learned", "learned", *best],
        "evaluate": ["best", "--reference", folder, "--windows", "4"],
    }
    for name, arguments in calls.items():
        command = [
            sys.executable,
            "-m",
            "spinquant",
            name.split()[0],
            *arguments,
            "--device",
            device,
            "--quiet",
            "--json",
        ]

        def run(command: list[str] = command) -> str:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise AssertionError(done.stderr[-2000:])
            return done.stdout.strip().splitlines()[-1][:200] if done.stdout.strip() else "done"

        yield f"spinquant {name}", run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", nargs="*", default=list(CONFIGS), choices=CONFIGS, metavar="NAME")
    parser.add_argument("--model", help="a model of `models.py`, or a folder, that the commands run on")
    parser.add_argument("--json", type=Path, help="file that every check is appended to, as a line of JSON")
    arguments = parser.parse_args()
    print(f"{arguments.device}: {device_name(arguments.device)}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    checks = [(f"{name}: {what}", run) for name in arguments.tiny for what, run in checks_of(name, arguments.device)]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model:
            from models import MODELS, model_folder

            known = arguments.model in MODELS
            folder = str(model_folder(arguments.model) if known else Path(arguments.model).resolve())
            checks += commands(folder, arguments.device, Path(scratch))
        for name, run in checks:
            begun, passed = time.perf_counter(), True
            try:
                found = run()
            except Exception as error:  # every check runs, whatever the others do
                places = [p for p in traceback.extract_tb(error.__traceback__) if "spinquant" in p.filename]
                where = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
                found, passed = f"{type(error).__name__}: {error}{where}", False
            failed += not passed
            seconds = time.perf_counter() - begun
            print(f"{'passed' if passed else 'FAILED'} {name} ({seconds:.1f} s): {found}", flush=True)
            if arguments.json:
                line = {"check": name, "passed": passed, "seconds": seconds, "found": found}
                with arguments.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print(f"{len(checks) - failed} passed, {failed} failed")
    raise SystemExit(bool(failed))


def device_name(device: str) -> str:
    """What the device calls itself."""
    kind = torch.device(device).type
    return (
        platform.processor() or platform.machine()
        if kind == "cpu"
        else torch.get_device_module(kind).get_device_name(device)
    )


if __name__ == "__main__":
    main()
