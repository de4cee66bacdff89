"""Reading, writing and locking work on systems without fcntl, preadv, pwrite and O_DIRECT (Windows)."""

import json
import os
import subprocess
import sys

from checkpoints import digest, saved
from processes import run_source
from spinquant.checkpoint.positional_io import read_at, write_at

LACK = """
import os, sys
sys.modules["fcntl"] = None
for name in ("preadv", "pwrite", "pread", "posix_fadvise", "O_DIRECT", "RWF_NOWAIT", "fchmod"):
    if hasattr(os, name):
        delattr(os, name)
"""
RUN = """
import json, sys
from spinquant.cli.main import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["spinquant", *line]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""
SHORT = ("--samples", "2", "--sample-length", "16", "--memory", "1KB")
COMMANDS = {
    "rotate": ("--rotations", "R1,R2"),
    "quantize": ("--scheme", "W4A8KV4", "--method", "gptq", *SHORT),
}


def test_reads_and_writes_at_offsets_work_without_preadv_and_pwrite(tmp_path, monkeypatch):
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


def test_commands_write_the_same_bytes_without_unix_calls(tmp_path):
    """Stands in for Windows, which has none of these calls."""
    model = saved(tmp_path / "model", "llama-tied")
    text = tmp_path / "text"
    text.write_text(" ".join(f"word{i % 97}" for i in range(400)))

    def lines(kind: str) -> str:
        (tmp_path / kind).mkdir()
        out = {command: str(tmp_path / kind / command) for command in COMMANDS}
        lines = [[c, str(model), out[c], "--text", str(text), *options] for c, options in COMMANDS.items()]
        lines[-1] += ["--calibration", str(text)]
        return json.dumps(lines)

    own = run_source(RUN, [lines("own")])
    command = [sys.executable, "-c", LACK + RUN, lines("lacking")]  # what is imported once would be there
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    lacking = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert own.returncode == 0, own.stderr[-3000:]
    assert lacking.returncode == 0, lacking.stderr[-3000:]
    for command in COMMANDS:
        assert digest(tmp_path / "own" / command) == digest(tmp_path / "lacking" / command), command
    for kind in ("own", "lacking"):
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == sorted(COMMANDS)
