"""Run the contracts and the laws of online parts under several releases of transformers, each in its own environment.

python versions/run.py                    the oldest supported release, the locked one, and the newest in the registry
python versions/run.py newest             one of them
python versions/run.py newest -- -k kv    what follows is for pytest, in place of the usual tests

Environments are kept in .versions/ and made anew when the release or the project's dependencies change. Exit code 1 if
a test fails under any release.
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
TESTS = ["tests/contracts", "tests/online", "tests/formats/test_native.py", "tests/formats/test_register.py"]
# Beside transformers, in the locked versions; transformers chooses what else it needs.
LOCKED = ("torch", "compressed-tensors", "peft", "accelerate", "numba", "pytest", "pytest-xdist")


class VersionsError(Exception):
    """An environment cannot be made."""


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, tests = arguments[:split] or ["oldest", "locked", "newest"], arguments[split + 1 :]
    unknown = [name for name in names if name not in ("oldest", "locked", "newest")]
    if unknown:
        print(f"unknown release {unknown[0]!r}: expected oldest, locked or newest")
        return 2
    failed, done = 0, set()
    for name in names:
        try:
            version = release(name)
            if version in done:
                print(f"{name}: transformers {version}, which was tested already")
                continue
            done.add(version)
            python = environment(name, version)
        except VersionsError as error:
            print(f"FAILED {name}: {error}")
            failed = 1
            continue
        start = time.monotonic()
        command = [str(python), "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", *(tests or TESTS)]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        state = "FAILED" if code else "ok    "
        print(f"{state} {name}: transformers {version} ({time.monotonic() - start:.0f} s)", flush=True)
        failed |= bool(code)
    return failed


def release(name: str) -> str:
    """The version of transformers that a name stands for."""
    if name == "locked":
        return locked()["transformers"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = next(line for line in project["dependencies"] if re.match(r"transformers\b", line))
    lowest = re.search(r">=\s*([\d.]+)", wanted)
    if name == "oldest":
        assert lowest is not None
        return lowest.group(1) if lowest.group(1).count(".") > 1 else f"{lowest.group(1)}.*"
    # What pip would install today, under no bound but the major version.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    run = subprocess.run([*command, "--report", "-", "transformers<6"], capture_output=True, text=True, check=False)
    if run.returncode:
        raise VersionsError(f"asking the registry failed: {run.stderr.strip()}")
    return json.loads(run.stdout)["install"][0]["metadata"]["version"]


def locked() -> dict[str, str]:
    """The versions of the lock file."""
    lines = (line.partition("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    return {name.strip(): version.strip() for name, _, version in lines}


def environment(name: str, version: str) -> Path:
    """The interpreter of the environment of a release, made if it is missing or not as wanted."""
    place = PLACE / name
    python, mark = place / "bin" / "python", place / "installed.json"
    found = locked()
    packages = [f"{package}=={found[package]}" for package in LOCKED]
    wanted = json.dumps([version, packages, (ROOT / "pyproject.toml").read_text()])
    if mark.exists() and mark.read_text() == wanted:
        return python
    print(f"installing transformers {version} in {place}", flush=True)
    venv.create(place, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [*pip, f"torch=={found['torch']}"],  # by itself: with the CPU build that may be on the disk
        [*pip, f"transformers=={version}", *packages, "safetensors", "pydantic", "typer", "rich", "filelock"],
        [*pip, "--no-deps", "--editable", str(ROOT)],
    ]
    for step in steps:
        run = subprocess.run(step, capture_output=True, text=True, check=False)
        if run.returncode:
            raise VersionsError(f"{' '.join(step[2:])}: {run.stderr.strip()[-2000:]}")
    mark.write_text(wanted)
    return python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
