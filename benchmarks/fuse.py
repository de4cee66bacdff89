"""Measure CPU time and extra memory of fusing R1, R2 and R4, against llm-compressor's SpinQuantModifier.

Both get the same model in the same run, each in a process of its own: the model is loaded, the counters are set to
zero, and only the fusing is measured. The peer gets an environment of its own, since it pins other versions:

    python benchmarks/fuse.py                 # SmolLM2-135M, and a randomly initialised Llama of 1B shape
    python benchmarks/fuse.py --models small  # the first only
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = ("torch==2.13.0", "llmcompressor==0.14.0.1")
TOOLS = ("spinquant", "llm-compressor")
ONE_BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def resident() -> dict[str, int]:
    """Resident memory of this process in bytes: now, and the peak since `reset_peak`. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": found["VmRSS"], "peak": found["VmHWM"]}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(tool: str, folder: str, dtype: str) -> dict[str, float]:
    """Fuse in this process; seconds of CPU and wall time, and bytes beyond the loaded model at the peak."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # safetensors maps files: make every page resident before counting
    fuse = {"spinquant": fuse_ours, "llm-compressor": fuse_theirs}[tool]
    step = fuse(model)
    before = resident()["now"]
    reset_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "extra_bytes": resident()["peak"] - before,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
    }


def fuse_ours(model):
    import spinquant

    def step() -> None:
        plan = spinquant.plan_of(model)
        rotations = spinquant.make_rotations(plan, spinquant.RotationSpec("R1,R2,R4", "random-hadamard"))
        spinquant.fuse_module(model, plan, rotations)

    return step


def fuse_theirs(model):
    from llmcompressor.core import State
    from llmcompressor.modifiers.transform import SpinQuantModifier

    def step() -> None:
        modifier = SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard")
        state = State(model=model)
        modifier.on_initialize(state)
        modifier.on_calibration_start(state, None)

    return step


def peer_python(folder: Path) -> Path:
    """The interpreter of the peer's environment, made on the first call."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in PEER:  # torch first: the peer would otherwise take a CUDA build
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
        (folder / ".installed").touch()
    return python


def random_llama(folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**ONE_BILLION), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def run_worker(python: str | Path, tool: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [str(python), __file__, "--worker", tool, "--folder", str(folder), "--dtype", dtype]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small", "1b"], choices=["small", "1b"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, default=Path(".peer-venv"), help="environment of the peer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.folder, arguments.dtype)))
        return

    from spinquant.demo.model import demo_model

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    pythons = {"spinquant": Path(sys.executable), "llm-compressor": peer_python(arguments.peer)}
    results = []
    with tempfile.TemporaryDirectory(prefix="spinquant-bench-") as scratch:
        cases = {"small": ("SmolLM2-135M", None, "float32"), "1b": ("random Llama 1B", Path(scratch), "bfloat16")}
        for key in arguments.models:
            name, folder, dtype = cases[key]
            if folder is None:
                folder = demo_model()
            else:
                random_llama(folder, dtype)
            runs = {tool: [] for tool in TOOLS}
            for _ in range(arguments.repeats):  # in turn, so that drift of the machine's speed hits both
                for tool in TOOLS:
                    runs[tool].append(run_worker(pythons[tool], tool, folder, dtype))
            best = {tool: min(runs[tool], key=lambda run: run["cpu_seconds"]) for tool in TOOLS}
            ratios = {k: best[TOOLS[1]][k] / best[TOOLS[0]][k] for k in ("cpu_seconds", "wall_seconds", "extra_bytes")}
            results.append({"model": name, "dtype": dtype, "runs": runs, "ratios": ratios})
            print(f"\n{name}, {dtype}, {best['spinquant']['model_bytes'] / 2**20:.0f} MiB, best of {arguments.repeats}")
            for tool in TOOLS:
                b = best[tool]
                print(
                    f"  {tool:15} {b['cpu_seconds']:7.2f} CPU-s {b['wall_seconds']:7.2f} s wall "
                    f"{b['extra_bytes'] / 2**20:7.0f} MiB extra"
                )
            print("  ratio           " + ", ".join(f"{k.split('_')[0]} {v:.1f}x" for k, v in ratios.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
