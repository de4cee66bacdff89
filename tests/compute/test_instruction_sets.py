"""The limits that `make test-isa` puts on the instructions of torch and oneDNN are in force."""

import os
import platform
import subprocess
import sys

import pytest
import torch

X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" not in os.environ or not X86, reason="make test-isa limits torch, on x86")
def test_torch_uses_the_instructions_that_it_is_limited_to():
    assert torch.backends.cpu.get_cpu_capability() == os.environ["ATEN_CPU_CAPABILITY"].upper()


@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" not in os.environ or not X86, reason="make test-isa limits oneDNN, on x86")
def test_onednn_uses_the_instructions_that_it_is_limited_to():
    source = "import torch; one = torch.ones(32, 32, dtype=torch.int8); torch._int_mm(one, one)"
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    said = next(line for line in run.stdout.splitlines() if "info,cpu,isa:" in line)
    name = {"SSE41": "SSE4.1", "AVX2": "AVX2"}[os.environ["ONEDNN_MAX_CPU_ISA"]]
    assert said.endswith(f"isa:Intel {name}")
