"""Everything works where a system lacks what Unix has: locks of fcntl, reads and writes at offsets, O_DIRECT."""

import os
import subprocess
import sys

from checkpoints import digest, saved
from spinquant.checkpoint.positional_io import read_at, write_at

LACKING = """
import os, sys, warnings
sys.modules["fcntl"] = None
for name in ("preadv", "pwrite", "pread", "posix_fadvise", "O_DIRECT", "RWF_NOWAIT", "fchmod"):
    if hasattr(os, name):
        delattr(os, name)
from spinquant.cli.main import main
main()
"""
SHORT = ("--samples", "2", "--sample-length", "16", "--memory", "1KB")
COMMANDS = {
    "rotate": ("--rotations", "R1,R2"),
    "quantize": ("--scheme", "W4A8KV4", "--method", "gptq", *SHORT),
}


def test_offsets_without_calls_for_them_are_those_with_them(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for name in ("own", "lacking"):
        if name == "lacking":
            monkeypatch.delattr(os, "preadv")
            monkeypatch.delattr(os, "pwrite")
        path.write_bytes(b"0123456789")
        with path.open("r+b", buffering=0) as file:
            assert write_at(file.fileno(), b"abc", 4) == 3
            found = bytearray(4)
            assert read_at(file.fileno(), found, 3) == 4 and found == b"3abc"
            assert read_at(file.fileno(), found, 8) == 2 and found[:2] == b"89"


def test_commands_write_the_same_bytes_without_them(tmp_path):
    """On Windows, which has none of them, nothing could be tried here."""
    model = saved(tmp_path / "model", "llama-tied")
    text = tmp_path / "text"
    text.write_text(" ".join(f"word{i % 97}" for i in range(400)))
    for command, options in COMMANDS.items():
        found = []
        for start in (["-c", LACKING], ["-m", "spinquant"]):
            out = tmp_path / "out"
            line = [sys.executable, *start, command, str(model), str(out), "--text", str(text), *options, "--force"]
            line += ["--calibration", str(text)] if command == "quantize" else []
            run = subprocess.run(line, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr[-3000:]
            found.append(digest(out))
            assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text"]
        assert found[0] == found[1], command
