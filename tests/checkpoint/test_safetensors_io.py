"""Reading and writing safetensors files, compared with the safetensors library."""

import errno
import os
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from spinquant import CheckpointError
from spinquant.checkpoint import direct_io as direct
from spinquant.checkpoint.direct_io import DirectReader, room_for
from spinquant.checkpoint.safetensors_io import DTYPES, TensorFile, file_hash, place_of, read_entries, rows_in


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


def read_rows(file: DirectReader, entry, first: int, last: int, buffer: torch.Tensor) -> torch.Tensor:
    return rows_in(file.read(*place_of(entry, first, last), buffer), entry)


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
def test_written_bytes_equal_those_of_safetensors(tmp_path, order):
    (tmp_path / "ours").write_bytes(b"left by a run that was stopped" * 1000)
    tensors = some_tensors()
    digest = write(tmp_path / "ours", tensors, order=order)
    assert (tmp_path / "ours").read_bytes() == save(tensors, metadata={"format": "pt"})
    assert digest == file_hash(tmp_path / "ours")


def test_files_are_exchangeable_with_safetensors(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "ours", tensors)
    loaded = load_file(tmp_path / "ours")
    assert set(loaded) == set(tensors)
    save_file(tensors, tmp_path / "theirs")
    entries = read_entries(tmp_path / "theirs")
    assert set(entries) == set(tensors)
    with closing(DirectReader(tmp_path / "theirs")) as file:
        for name, tensor in tensors.items():
            assert loaded[name].dtype == entries[name].dtype == tensor.dtype
            buffer = torch.empty(10_000, dtype=torch.uint8)
            found = read_rows(file, entries[name], 0, entries[name].rows, buffer)
            assert found.shape == loaded[name].shape == tensor.shape
            for other in (found, loaded[name]):
                assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def direct_or_skip(folder) -> None:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no direct writes on this system")
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct writes in this file system")
    (folder / "probe").unlink()


class Disk:
    """Replaces os.open and os.pwrite: records direct writes, of which the n-th fails or writes fewer bytes."""

    def __init__(self, monkeypatch, *, number: int | None = None, failing: int = 0, count: int = 0):
        self.direct, self.lengths, self.number, self.failing, self.count = set(), [], number, failing, count
        self.open, self.pwrite = os.open, os.pwrite
        monkeypatch.setattr(os, "open", self.opened)
        monkeypatch.setattr(os, "pwrite", self.written)

    def opened(self, path, flags, *mode):
        file = self.open(path, flags, *mode)
        (self.direct.add if flags & os.O_DIRECT else self.direct.discard)(file)
        return file

    def written(self, file, data, offset):
        if file in self.direct:
            self.lengths.append(len(data))
            if len(self.lengths) == self.number:
                if self.failing:
                    raise OSError(self.failing, "failed")
                data = data[: self.count]
        return self.pwrite(file, data, offset)


@pytest.mark.parametrize("gathered", [4096, 3 * 4096, 1 << 22])
@pytest.mark.parametrize("order", [1, -1])
def test_whole_pages_are_written_past_the_page_cache(tmp_path, monkeypatch, gathered, order):
    direct_or_skip(tmp_path)
    monkeypatch.setattr("spinquant.checkpoint.direct_io.WRITE_BUFFER", gathered)
    numbers = torch.arange(60_000, dtype=torch.int32)
    tensors = {"a": numbers[:50_001].view(16667, 3).clone(), "b": numbers[:7], "c": numbers.view(6, 2500, 4).short()}
    disk = Disk(monkeypatch)
    digest = write(tmp_path / "ours", tensors, order=order)
    assert (tmp_path / "ours").read_bytes() == save(tensors, metadata={"format": "pt"})
    assert digest == file_hash(tmp_path / "ours")
    assert all(length % 4096 == 0 and length <= gathered for length in disk.lengths)
    assert sum(disk.lengths) > 300_000 or order == -1


@pytest.mark.parametrize("trouble", [{"failing": errno.EINVAL}, {"count": 4096}, {"count": 512}, {"count": 0}])
@pytest.mark.parametrize("number", [1, 3])
def test_refused_direct_writes_fall_back_to_the_page_cache(tmp_path, monkeypatch, number, trouble):
    direct_or_skip(tmp_path)
    monkeypatch.setattr("spinquant.checkpoint.direct_io.WRITE_BUFFER", 3 * 4096)
    tensors = {"a": torch.arange(50_000, dtype=torch.int32).view(100, 500)}
    disk = Disk(monkeypatch, number=number, **trouble)
    assert write(tmp_path / "ours", tensors) == file_hash(tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == save(tensors, metadata={"format": "pt"})
    assert len(disk.lengths) == number or trouble.get("count") in (0, 4096)


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    direct_or_skip(tmp_path)
    monkeypatch.setattr("spinquant.checkpoint.direct_io.WRITE_BUFFER", 3 * 4096)
    Disk(monkeypatch, number=2, failing=errno.ENOSPC)
    with pytest.raises(OSError, match="failed") as found:
        write(tmp_path / "ours", {"a": torch.arange(50_000, dtype=torch.int32)})
    assert found.value.errno == errno.ENOSPC


def test_consecutive_files_reuse_one_write_buffer(tmp_path):
    direct_or_skip(tmp_path)
    places, others = set(), []
    for i in range(4):
        file = TensorFile(tmp_path / str(i), {"a": (torch.float32, (3000, 4))})
        file.begin()
        file.write("a", 0, torch.ones(3000, 4))
        assert file._direct._memory is not None
        places.add(file._direct._memory.data_ptr())
        file.finish()
        assert file._direct._memory is None
        others.append(
            torch.empty(direct.WRITE_BUFFER + direct.PAGE, dtype=torch.uint8)
        )  # would be allocated where a freed buffer was
    assert len(places) == 1


@pytest.mark.parametrize("flags", ["absent", "refused"])
def test_files_are_written_without_o_direct(tmp_path, monkeypatch, flags):
    if flags == "absent":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    else:
        monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)  # fails for a file
    tensors = some_tensors()
    assert write(tmp_path / "ours", tensors) == file_hash(tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_rows_of_a_tensor_are_read_from_their_byte_range(tmp_path):
    tensors = {"a": torch.arange(60.0).view(10, 6), "b": torch.arange(24, dtype=torch.int16).view(4, 2, 3)}
    save_file(tensors, tmp_path / "file")
    entries = read_entries(tmp_path / "file")
    buffer = torch.empty(1000, dtype=torch.uint8)
    with closing(DirectReader(tmp_path / "file")) as file:
        for name, tensor in tensors.items():
            assert torch.equal(read_rows(file, entries[name], 1, 3, buffer), tensor[1:3])


@pytest.mark.parametrize("kind", ["direct", "cached", "nowhere", "refused", "short", "coarse"])
def test_any_range_of_a_file_is_read_correctly(tmp_path, monkeypatch, kind):
    """Past the page cache or through it, also if the disk refuses or shortens reads."""
    direct_or_skip(tmp_path)
    whole = bytes(torch.arange(90_001).short().numpy().tobytes())
    (tmp_path / "file").write_bytes(whole)
    if kind == "nowhere":
        monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(direct, "_is_cached", lambda file: kind == "cached")
    preadv, lengths = os.preadv, []

    def limited(file, buffers, offset, *flags):
        if file == reader._direct:
            lengths.append(len(buffers[0]))
            if kind == "refused":
                raise OSError(errno.EINVAL, "alignment")
            if kind in ("short", "coarse"):
                buffers = [buffers[0][: 4096 if kind == "short" else 512]]
        return preadv(file, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", limited)
    buffer, generator = torch.empty(room_for(50_000), dtype=torch.uint8), torch.Generator().manual_seed(0)
    with closing(DirectReader(tmp_path / "file")) as reader:
        for offset, nbytes in ((0, 8), (4096, 4096), (8, 50_000), (40_000, 0), (180_000, 2), (4088, 16), (31, 5000)):
            for shift in (0, int(torch.randint(1, 5000, (), generator=generator))):
                found = reader.read(offset, nbytes, buffer[shift:])
                assert bytes(found.numpy().tobytes()) == whole[offset : offset + nbytes], (offset, nbytes, shift)
        with pytest.raises(OSError, match="ends at byte 180002"):
            reader.read(180_000, 16, buffer)
        small = torch.empty(100, dtype=torch.uint8)
        assert bytes(reader.read(16, 100, small).numpy().tobytes()) == whole[16:116]
    assert bool(lengths) == (kind not in ("cached", "nowhere"))
    assert all(length % 4096 == 0 for length in lengths)


def test_cached_files_are_read_through_the_page_cache(tmp_path):
    direct_or_skip(tmp_path)
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("the system has no RWF_NOWAIT")
    (tmp_path / "file").write_bytes(bytes(1 << 26))
    with closing(DirectReader(tmp_path / "file")) as reader:
        assert reader._direct is None
    file = os.open(tmp_path / "file", os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    is_kept = direct._is_cached(file)
    os.close(file)
    if is_kept:
        pytest.skip("the system ignores POSIX_FADV_DONTNEED")
    for _ in range(5):  # sampling does not fill the cache
        with closing(DirectReader(tmp_path / "file")) as reader:
            assert reader._direct is not None


def looks(monkeypatch, look):
    """Replace reads without waiting (RWF_NOWAIT) by `look`."""
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    monkeypatch.setattr(os, "preadv", look, raising=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: None, raising=False)
    for name in ("POSIX_FADV_RANDOM", "POSIX_FADV_NORMAL"):
        monkeypatch.setattr(os, name, 0, raising=False)


@pytest.mark.parametrize("found", range(direct._SAMPLES + 1))
def test_a_file_is_cached_if_most_samples_are(tmp_path, monkeypatch, found):
    answers = iter([True] * found + [False] * (direct._SAMPLES - found))

    def look(file, buffers, offset, flags):
        if not next(answers):
            raise BlockingIOError
        return 1

    looks(monkeypatch, look)
    (tmp_path / "file").write_bytes(bytes(10))
    with (tmp_path / "file").open("rb") as file:
        assert direct._is_cached(file.fileno()) == (found > direct._SAMPLES // 2)


def test_a_file_is_read_through_the_cache_if_its_state_is_unknown(tmp_path, monkeypatch):
    def look(*arguments):
        raise OSError(errno.EOPNOTSUPP, "no such reads")

    looks(monkeypatch, look)
    (tmp_path / "file").write_bytes(bytes(10))
    with (tmp_path / "file").open("rb") as file:
        assert direct._is_cached(file.fileno())


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
def test_a_damaged_file_raises_an_error_that_names_it(tmp_path, kind):
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
    with closing(DirectReader(path)) as file, pytest.raises(OSError, match="ends at byte"):
        read_rows(file, entry, 0, 10, torch.empty(240, dtype=torch.uint8))
