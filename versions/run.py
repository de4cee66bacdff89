"""Run the contracts and the laws of online parts under several releases of the libraries, each in its own environment.

python versions/run.py                    the oldest supported releases, the locked ones, the newest in the registry
python versions/run.py newest             one of them
python versions/run.py newest -- -k kv    what follows is for pytest, in place of the usual tests

`oldest` installs the lower bounds of pyproject.toml, and `newest` what pip installs today beside the newest release of
transformers 5, whatever the upper bound says. torch is the locked one in all of them: any other is a download of
gigabytes. Environments are kept in .versions/ and made anew when a release or the project's dependencies change. Exit
code 1 if a test fails under any release.
"""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PLACE = Path(os.environ.get("SPINQUANT_VERSIONS", ROOT / ".versions"))
NAMES = ("oldest", "locked", "newest")
# What is tried in several releases: each has a lower bound in pyproject.toml and a line in the lock file.
LIBRARIES = (
    *("transformers", "safetensors", "peft", "accelerate", "compressed-tensors", "datasets"),
    *("numba", "filelock", "pydantic", "typer", "rich"),
)
# In the locked version everywhere.
LOCKED = ("torch", "pytest", "pytest-xdist")
# GPT-BigCode of transformers 5.17, under a torch that is newer than it.
IGNORED = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
FAMILIES = "tests/laws/test_families.py"
TESTS = [
    *("tests/contracts", "tests/online", FAMILIES, "tests/adapters", "tests/checkpoint"),
    *("tests/formats/test_native.py", "tests/formats/test_register.py", "tests/formats/test_training.py"),
    "tests/formats/test_compressed_tensors.py",
    # Of the laws of families: all rotations together, and what each of them moves, loads and refuses.
    *("-k", "not (test_rotating_leaves_the_logits_unchanged and not -all or test_other_rotation_types or test_prove)"),
]


class VersionsError(Exception):
    """An environment cannot be made."""


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, tests = arguments[:split] or NAMES, arguments[split + 1 :]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"unknown release {unknown[0]!r}: expected oldest, locked or newest")
        return 2
    failed, done = 0, []
    for name in names:
        try:
            pins = releases(name)
            if pins in done:
                print(f"{name}: {said(pins)}, which was tested already")
                continue
            done.append(pins)
            python = environment(name, pins)
        except VersionsError as error:
            print(f"FAILED {name}: {error}")
            failed = 1
            continue
        start = time.monotonic()
        command = [str(python), "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", "-W", IGNORED]
        command += tests or TESTS
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        state = "FAILED" if code else "ok    "
        print(f"{state} {name}: {said(pins)} ({time.monotonic() - start:.0f} s)", flush=True)
        failed |= bool(code)
    return failed


def releases(name: str) -> dict[str, str]:
    """Library -> release, of what a name stands for."""
    if name == "oldest":
        return lower_bounds()
    found = locked()
    if name == "locked":
        return {library: found[library] for library in LIBRARIES}
    # The newest transformers, under no bound but the major version, then what pip would put beside it.
    transformers = asked("--no-deps", "transformers<6")["transformers"]
    chosen = asked(f"torch=={found['torch']}", f"transformers=={transformers}", *LIBRARIES[1:])
    return {library: chosen[library] for library in LIBRARIES}


def lower_bounds() -> dict[str, str]:
    """The oldest release of each library that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    bounds = {}
    for line in lines:
        found = re.match(r"([A-Za-z0-9_-]+)>=([\d.]+)", line)
        if found and found[1] in LIBRARIES:
            bounds[found[1]] = found[2]
    missing = [library for library in LIBRARIES if library not in bounds]
    assert not missing, f"no lower bound in pyproject.toml: {missing}"
    return {library: bounds[library] for library in LIBRARIES}


def locked() -> dict[str, str]:
    """The releases of the lock file."""
    lines = (line.partition("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    return {name.strip(): version.strip() for name, _, version in lines}


def asked(*wanted: str) -> dict[str, str]:
    """What pip would install today for these requirements, name -> release; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    run = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if run.returncode:
        raise VersionsError(f"asking the registry for {', '.join(wanted)} failed: {run.stderr.strip()[-2000:]}")
    found = [item["metadata"] for item in json.loads(run.stdout)["install"]]
    return {re.sub("[-_.]+", "-", item["name"]).lower(): item["version"] for item in found}


def said(pins: dict[str, str]) -> str:
    """The releases as text, without the small libraries."""
    return ", ".join(f"{library} {version}" for library, version in list(pins.items())[:6])


def environment(name: str, pins: dict[str, str]) -> Path:
    """The interpreter of the environment of these releases, made if it is missing or not as wanted."""
    place, found = PLACE / name, locked()
    python, mark = place / "bin" / "python", place / "installed.json"
    packages = [*(f"{library}=={version}" for library, version in pins.items()), *(f"{n}=={found[n]}" for n in LOCKED)]
    wanted = json.dumps([packages, (ROOT / "pyproject.toml").read_text()])
    if mark.exists() and mark.read_text() == wanted:
        return python
    print(f"installing {said(pins)} in {place}", flush=True)
    start = time.monotonic()
    venv.create(place, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [*pip, f"torch=={found['torch']}"],  # by itself: with the CPU build that may be on the disk
        [*pip, *packages],
        [*pip, "--no-deps", "--editable", str(ROOT)],
    ]
    for step in steps:
        run = subprocess.run(step, capture_output=True, text=True, check=False)
        if run.returncode:
            raise VersionsError(f"{' '.join(step[2:])}: {run.stderr.strip()[-2000:]}")
    mark.write_text(wanted)
    print(f"installed in {time.monotonic() - start:.0f} s", flush=True)
    return python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
