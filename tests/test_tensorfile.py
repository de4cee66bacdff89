"""safetensors files, held against the library that defines them."""

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from spinquant import CheckpointError
from spinquant.tensorfile import DTYPES, TensorFile, file_hash, read_entries, read_rows


def some_tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, several shapes, names that need escaping."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 256, (7, 24), generator=generator, dtype=torch.uint8)
    found = {f"{name}.weight": numbers.clone().view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    return found | {
        "bool": numbers > 100,
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        'Größe "x"': numbers.clone(),
        "cube": numbers[:6].view(torch.int16).view(2, 3, 12).clone(),
    }


def write(path, tensors, *, order=1):
    file = TensorFile(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    file.begin()
    for name in list(file.entries)[::order]:
        rows = tensors[name]
        step = len(rows) // 2 if rows.ndim and len(rows) > 1 else 1
        for first in range(0, len(rows) if rows.ndim else 1, step):
            file.write(name, first, rows[first : first + step] if rows.ndim else rows)
    return file.finish()


@pytest.mark.parametrize("order", [1, -1])
def test_the_bytes_are_the_librarys_own(tmp_path, order):
    (tmp_path / "ours").write_bytes(b"left by a run that was stopped" * 1000)
    tensors = some_tensors()
    digest = write(tmp_path / "ours", tensors, order=order)
    assert (tmp_path / "ours").read_bytes() == save(tensors, metadata={"format": "pt"})
    assert digest == file_hash(tmp_path / "ours")


def test_the_library_reads_ours_and_we_read_the_librarys(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "ours", tensors)
    loaded = load_file(tmp_path / "ours")
    assert set(loaded) == set(tensors)
    save_file(tensors, tmp_path / "theirs")
    entries = read_entries(tmp_path / "theirs")
    assert set(entries) == set(tensors)
    with (tmp_path / "theirs").open("rb") as file:
        for name, tensor in tensors.items():
            assert loaded[name].dtype == entries[name].dtype == tensor.dtype
            buffer = torch.empty(10_000, dtype=torch.uint8)
            found = read_rows(file.fileno(), entries[name], 0, entries[name].rows, buffer)
            assert found.shape == loaded[name].shape == tensor.shape
            for other in (found, loaded[name]):
                assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_rows_are_the_rows(tmp_path):
    tensors = {"a": torch.arange(60.0).view(10, 6), "b": torch.arange(24, dtype=torch.int16).view(4, 2, 3)}
    save_file(tensors, tmp_path / "file")
    entries = read_entries(tmp_path / "file")
    buffer = torch.empty(1000, dtype=torch.uint8)
    with (tmp_path / "file").open("rb") as file:
        for name, tensor in tensors.items():
            assert torch.equal(read_rows(file.fileno(), entries[name], 1, 3, buffer), tensor[1:3])


def damaged(data: bytes, kind: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    return {
        "empty": b"",
        "header cut": data[: 8 + length // 2],
        "numbers cut": data[:-1],
        "garbage": b"\xff" * 1000,
        "not JSON": data[:8] + b"\x00" * length + data[8 + length :],
        "wrong shape": data.replace(b"[10,6]", b"[10,7]"),
        "unknown dtype": data.replace(b'"F32"', b'"F31"'),
        "negative offset": data.replace(b"[0,240]", b"[-9,24]"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "header cut",
        "numbers cut",
        "garbage",
        "not JSON",
        "wrong shape",
        "unknown dtype",
        "negative offset",
    ],
)
def test_damage_names_the_file(tmp_path, kind):
    path = tmp_path / "shard.safetensors"
    save_file({"a": torch.arange(60.0).view(10, 6)}, path)
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(CheckpointError, match=r"shard\.safetensors"):
        read_entries(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "file"
    save_file({"a": torch.arange(60.0).view(10, 6)}, path)
    entry = read_entries(path)["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with path.open("rb") as file, pytest.raises(OSError, match="ends at byte"):
        read_rows(file.fileno(), entry, 0, 10, torch.empty(240, dtype=torch.uint8))
