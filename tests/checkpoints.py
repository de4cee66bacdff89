"""Checkpoints on disk that several tests write and compare."""

import hashlib
import json
from contextlib import closing

import torch
from safetensors.torch import load_file, save_file

from models import byte_tokenizer, tiny_model
from spinquant.architectures import make_plan
from spinquant.checkpoint.folder import load_config
from spinquant.checkpoint.reader import Source
from spinquant.entrypoints import validation


def weights(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_same(folder, other):
    """Two folders hold the same tensors, bit for bit."""
    found, expected = weights(folder), weights(other)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def saved(path, name, dtype=torch.float32, **options):
    """A tiny model on disk."""
    model = tiny_model(name, dtype=dtype)
    model.save_pretrained(path, **options)
    byte_tokenizer().save_pretrained(path)
    return path


def quantize_to_fp8(folder, *, block=(16, 32)) -> dict[str, torch.Tensor]:
    """Turn a folder into an FP8 one with block scales, as DeepSeek's are; what its weights stand for, in float32."""
    stored, exact = {}, {}
    for name, tensor in weights(folder).items():
        exact[name] = tensor.float()
        if "_proj.weight" not in name:
            stored[name] = tensor
            continue
        rows, columns = (-(-n // b) for n, b in zip(tensor.shape, block, strict=True))
        scale = torch.empty(rows, columns)
        codes, numbers = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn), torch.empty(tensor.shape)
        for i in range(rows):
            for j in range(columns):
                part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                scale[i, j] = tensor[part].float().abs().max() / 448
                codes[part] = (tensor[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
                numbers[part] = codes[part].float() * scale[i, j]
        stored[name], stored[f"{name}_scale_inv"], exact[name] = codes, scale, numbers
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(config))
    return exact


def digest(folder) -> str:
    """Of all files of a folder, by name; of its card without the command, which names the folder."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        if name == "README.md":
            content = b"".join(line for line in content.splitlines(True) if not line.startswith(b"spinquant "))
        if name == "spinquant/checksums.sha256":
            content = b"".join(line for line in content.splitlines(True) if not line.endswith(b"  README.md\n"))
        found.update(name.encode() + content)
    return found.hexdigest()


def from_disk(folder) -> bool:
    """Whether the blocks of a folder can be calibrated one by one."""
    config = load_config(folder)
    with closing(Source(folder, config)) as source:
        return validation.from_disk(config, make_plan(config, source.shapes))
