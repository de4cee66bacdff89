"""Standard output that is closed, full or read by a process that has ended: one line, exit code 1 and no traceback."""

from pathlib import Path

import pytest

from processes import run_source
from spinquant import Options, RotationSpec, rotate_folder
from spinquant.checkpoint.checksums import check_checksums

SCRIPT = """
import os, sys
from spinquant.cli.main import main

kind, model, rotated, out = sys.argv[1:]
COMMANDS = [["--version"], ["--help"], ["plan", "--help"], ["plan", model], ["plan", model, "--json"],
            ["verify", rotated, "--checksums"], ["verify", rotated, "--checksums", "--json"],
            ["rotate", model, out, "--no-compare", "--quiet", "--rotations", "R1"]]
for command in COMMANDS:
    if kind == "closed":
        os.close(1)
        sys.stdout = None
    else:
        if kind == "full":
            file = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, file = os.pipe()
            os.close(reader)
        os.dup2(file, 1)
        os.close(file)
        sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.argv = ["spinquant", *command]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    print("code", code, *command[:2], file=sys.stderr)
sys.stdout = open(os.devnull, "w")
"""
COMMANDS = 8


@pytest.mark.parametrize("kind", ["closed", "full", "ended"])
def test_output_that_cannot_be_written_is_an_error_without_a_traceback(kind, folder, tmp_path):
    if kind == "full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    spec, rotated, out = RotationSpec("R1"), tmp_path / "rotated", tmp_path / "out"
    rotate_folder(folder, rotated, spec, text=None, options=Options(prove=False))
    done = run_source(SCRIPT, [kind, folder, rotated, out])
    lines = done.stderr.splitlines()
    codes = [line for line in lines if line.startswith("code ")]
    assert len(codes) == COMMANDS and all(line.startswith("code 1 ") for line in codes), done.stderr
    errors = [line for line in lines if line.startswith("error: cannot write the result to standard output: ")]
    assert len(errors) == (0 if kind == "ended" else COMMANDS) and len(lines) == len(errors) + len(codes), done.stderr
    # No file of the result took the number of standard output.
    assert check_checksums(out) == []
    shard = "model.safetensors"
    assert (out / shard).read_bytes() == (rotated / shard).read_bytes()
