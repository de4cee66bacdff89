"""Folders from strangers: names lead to files of the folder alone, and JSON is limited; what is wrong is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from models import SIZES
from spinquant import CheckpointError, Options, RotationError, RotationSpec, SpinquantError, load, rotate_folder
from spinquant.checkpoint.folder import copied_files, load_config, read_headers, weight_files
from spinquant.checkpoint.untrusted import DEEPEST, LARGEST, check_inside, file_in, json_object, read_json
from spinquant.rotations.rotation import Hadamard, Kronecker, Orthogonal
from spinquant.rotations.serialization import restore, saved, to_save

QUICK = {"text": None, "options": Options(prove=False)}
NAMES = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", 3, None, ["x"], "C:\\x", "x" * 256]


@pytest.fixture
def model(tmp_path):
    """A folder in two shards."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "vocab_size": 64}, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    return folder


def change(path, function):
    data = json.loads(path.read_text())
    function(data)
    path.write_text(json.dumps(data))


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_only_names_of_files_in_the_folder_are_files(tmp_path, name):
    with pytest.raises(CheckpointError, match="expected the name of a file in that folder"):
        file_in(tmp_path, name)


@pytest.mark.parametrize("name", NAMES)
def test_an_index_that_names_a_path_is_refused_and_nothing_is_written(model, tmp_path, name):
    """The file at an absolute path was overwritten once."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(model / min(p.name for p in model.glob("*.safetensors")), outside / "x.safetensors")
    name = str(outside / "x.safetensors") if name == "/etc/passwd" else name
    index = model / "model.safetensors.index.json"
    change(index, lambda data: data["weight_map"].update({max(data["weight_map"]): name}))
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match="expected the name of a file in that folder"):
        rotate_folder(model, tmp_path / "out", RotationSpec("R1"), **QUICK)
    assert everything(tmp_path) == before


def test_a_shard_without_the_suffix_is_refused(model, tmp_path):
    """Its copy lay over the rotated one."""
    index = model / "model.safetensors.index.json"
    shard = min(model.glob("*.safetensors"))
    shard.rename(model / "shard")
    text = index.read_text().replace(shard.name, "shard")
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file"):
        rotate_folder(model, tmp_path / "out", RotationSpec("R1"), **QUICK)


def test_links_out_of_the_folder_are_refused(model, tmp_path):
    (tmp_path / "secret").write_text("s")
    (model / "NOTES.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        copied_files(model)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        rotate_folder(model, tmp_path / "out", RotationSpec("R1"), **QUICK)
    (model / "NOTES.md").unlink()
    shard = min(model.glob("*.safetensors"))
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        weight_files(model)


def test_links_of_the_hub_cache_and_inside_the_folder_are_followed(model, tmp_path):
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0a1b"
    blobs = tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (snapshot / "again.json").symlink_to("config.json")
    assert weight_files(snapshot) == weight_files(model)
    assert read_headers(snapshot) == read_headers(model)
    assert load_config(snapshot).model_type == "llama"
    rotate_folder(snapshot, tmp_path / "out", RotationSpec("R1"), **QUICK)
    (tmp_path / "secret").write_text("s")
    (snapshot / "leak").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        check_inside(snapshot, snapshot / "leak")


STATE = ["", "/lock", "/data", "/calibration", "/finished/x.json", "/data/model.safetensors.spinquant-writing"]


@pytest.mark.parametrize("place", [f".out.run{path}" for path in STATE])
def test_the_state_of_a_run_is_never_behind_a_link(model, tmp_path, place):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("1")
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True, parents=True)
    path.symlink_to(victim)
    with pytest.raises(CheckpointError, match="is a link, and the state of a run"):
        rotate_folder(model, tmp_path / "out", RotationSpec("R1"), force=True, **QUICK)
    assert (victim / "precious").read_text() == "1"


def test_a_folder_in_the_place_of_a_file_of_a_run_is_an_error(model, tmp_path):
    (tmp_path / ".out.run/settings.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"settings\.json, a file of the run .* cannot be used: .*directory"):
        rotate_folder(model, tmp_path / "out", RotationSpec("R1"), **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected an object"),
        (b"null", "expected an object"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_json_is_an_object_of_limited_depth(data, word):
    with pytest.raises(CheckpointError, match=word):
        json_object(data, "the file")


def test_json_of_the_greatest_depth_is_read():
    levels = DEEPEST - 1
    assert json_object(b'{"a":' * levels + b"{}" + b"}" * levels, "the file")


def test_files_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_json(tmp_path / "nothing")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(CheckpointError, match="expected at most"):
        read_json(tmp_path / "large")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("data", [b"[]", b"3", b"{}", b'{"weight_map": 3, "model_type": 7}', b"\xff", b"{" * 5000])
def test_a_folder_with_other_json_is_refused(model, tmp_path, file, data):
    (model / file).write_bytes(data)
    before = everything(tmp_path)
    with pytest.raises(SpinquantError):
        rotate_folder(model, tmp_path / "out", RotationSpec("R1"), **QUICK)
    assert everything(tmp_path) == before


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q


SIGNS = torch.tensor([1, -1] * 6, dtype=torch.int8)
ROTATIONS = {
    "hadamard": Hadamard(12, SIGNS),
    "dense": Orthogonal(orthogonal(12)),
    "product": Kronecker(orthogonal(3), 4, SIGNS),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_what_is_saved_is_restored(name):
    about, tensors = to_save({"residual": ROTATIONS[name]})
    found = saved(about, tensors)["residual"]
    x = torch.eye(12, dtype=torch.float64)
    assert torch.equal(found.apply(x), ROTATIONS[name].apply(x))


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: {k: v * 3 for k, v in tensors.items()},
        lambda tensors: {k: v * 0 for k, v in tensors.items()},
        lambda tensors: {k: v[:-1] for k, v in tensors.items()},
        lambda tensors: {k: v.flatten()[:5] for k, v in tensors.items()},
        lambda tensors: {k: v.double() / 0 for k, v in tensors.items()},
        lambda tensors: {k: v.double() * 1.001 for k, v in tensors.items()},
        lambda tensors: {},
        lambda tensors: {k: v != 0 for k, v in tensors.items()},
        lambda tensors: {k: v.to(torch.uint16) for k, v in tensors.items()},
        lambda tensors: {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()},
    ],
    ids=[
        "times 3",
        "zeros",
        "too short",
        "another shape",
        "not finite",
        "a little longer",
        "missing",
        "booleans",
        "unsigned",
        "8 bits",
    ],
)
def test_tensors_that_are_no_rotation_are_refused(name, spoil):
    rotation = ROTATIONS[name]
    with pytest.raises(RotationError):
        restore(rotation.describe(), spoil(rotation.tensors()))


@pytest.mark.parametrize("order", [0, -12, 11, 24, True, "12", None, 1.5])
@pytest.mark.parametrize("name", ROTATIONS)
def test_an_order_that_contradicts_the_tensors_is_refused(name, order):
    rotation = ROTATIONS[name]
    with pytest.raises(SpinquantError):
        restore({**rotation.describe(), "order": order}, rotation.tensors())


def test_a_spoilt_native_folder_does_not_load(model, tmp_path):
    from spinquant import parse_scheme, quantize_folder

    spec = RotationSpec("R1,R4")
    quantize_folder(model, tmp_path / "out", parse_scheme("none"), spec, **QUICK)
    load(tmp_path / "out")
    shard = next(p for p in (tmp_path / "out").glob("*.safetensors") if any("signs" in name for name in load_file(p)))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("signs"))
    tensors[name] = tensors[name] * 3
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="signs"):
        load(tmp_path / "out")
