"""What is published names no path of this machine, and a local original is still found where the folder was written."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from models import tiny_model
from spinquant import (
    CalibrationText,
    CheckpointError,
    LearnOptions,
    Options,
    RotationSpec,
    learn_folder,
    parse_scheme,
    quantize_folder,
    rotate_adapter,
    rotate_folder,
)
from spinquant.checkpoint.checksums import check_checksums
from spinquant.checkpoint.folder import BESIDE, ORIGIN, RECORD
from spinquant.entrypoints.hub import HIDDEN
from spinquant.entrypoints.local_paths import public_record
from spinquant.entrypoints.request import LearnText

QUICK, SCHEME, SPEC = Options(prove=False), parse_scheme("W4A8KV4"), RotationSpec("R1,R2,R4", "auto")
OTHERS = {"LICENSE": "as it was", "chat_template.jinja": "{{ messages }}", "extra/notes.txt": "inside a folder"}


@pytest.fixture
def source(folder):
    """A model with files beside its weights that are neither weights nor its config."""
    for name, text in OTHERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def pickled(source):
    """The same model with pickled weights, which are loaded as a whole."""
    folder = source.with_name("pickled")
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama-tied", dtype=torch.float32).state_dict(), folder / "pytorch_model.bin")
    return folder


def lora(folder):
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    name, hidden = "base_model.model.model.layers.0.self_attn.q_proj", tiny_model("llama-tied").config.hidden_size
    heads = tiny_model("llama-tied").state_dict()["model.layers.0.self_attn.q_proj.weight"].shape[0]
    update = {f"{name}.lora_A.weight": torch.randn(2, hidden), f"{name}.lora_B.weight": torch.randn(heads, 2)}
    save_file(update, folder / "adapter_model.safetensors")
    return folder


def learned(source, out, **options):
    (source.parent / "judge.txt").write_text("to be or not to be " * 40)
    samples = CalibrationText("manual", samples=6, length=24)
    text = LearnText(samples, held_out=str(source.parent / "judge.txt"), windows=2)
    return learn_folder(source, out, SCHEME, SPEC, LearnOptions("random", baselines=2), text=text, **options)


def published(folder):
    """Files of a folder that a push uploads."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(filter_repo_objects(names, ignore_patterns=list(HIDDEN)))


def rotated(source, out, command):
    rotate_folder(source, out, RotationSpec(), also=[lora(source.parent / "lora")], text="manual", command=command)


def quantized(source, out, command):
    learned(source, source.parent / "first")
    found = learned(source, source.parent / "learned", start=source.parent / "first", command=command)
    quantize_folder(source, out, SCHEME, SPEC, learned=found, text=None, options=QUICK, command=command)


def loaded_as_a_whole(source, out, command=None):
    options = {"text": None, "options": QUICK, "allow_pickle": True, "command": command}
    rotate_folder(pickled(source), out, RotationSpec(), **options)


@pytest.mark.parametrize("write", [rotated, quantized, loaded_as_a_whole])
def test_what_a_push_uploads_names_no_path_of_this_machine(write, source, tmp_path):
    write(source, tmp_path / "out", f"spinquant quantize {source} {tmp_path / 'out'} --also {tmp_path / 'lora'}")
    for folder in (tmp_path / name for name in ("out", "learned") if (tmp_path / name).exists()):
        assert {"README.md", "config.json" if folder.name == "out" else "learned.json"} <= set(published(folder))
        for name in published(folder):
            assert os.fsencode(tmp_path) not in (folder / name).read_bytes(), name


def test_records_name_models_and_texts(source, tmp_path):
    found = learned(source, tmp_path / "rotations")
    assert found.record["model"] == "model" and found.record["tokens"]["held_out"] == "judge.txt"
    result = quantize_folder(source, tmp_path / "out", SCHEME, SPEC, learned=found, text=None, options=QUICK)
    record = json.loads((tmp_path / "out" / BESIDE / RECORD).read_text())
    assert record["source"] == record["learned"]["model"] == "model"
    assert result.notes["source"] == str(source)


def test_hub_ids_stay():
    snapshot = "/home/me/.cache/huggingface/hub/models--org--Model-1B/snapshots/0123abcd"
    record = {"source": "org/Model-1B", "learned": {"model": snapshot, "tokens": {"held_out": "~/judge.txt"}}}
    found = public_record({**record, "adapters": {"lora": {"source": r"C:\Users\me\lora", "tensors": 2}}})
    assert found["source"] == found["learned"]["model"] == "org/Model-1B"
    assert found["learned"]["tokens"]["held_out"] == "judge.txt"
    assert found["adapters"] == {"lora": {"source": "lora", "tensors": 2}}


def test_a_local_original_is_found_until_it_is_gone(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rotate_folder("model", "out", RotationSpec(), text=None, options=QUICK)
    monkeypatch.chdir("/")
    out, adapter = tmp_path / "out", lora(tmp_path / "lora")
    rotate_adapter(out, adapter, tmp_path / "one")
    assert check_checksums(out) == []
    (out / BESIDE / ORIGIN).unlink()  # as in a folder that was downloaded from the Hub
    assert check_checksums(out) == []
    with pytest.raises(CheckpointError, match=r"'model' .* is not where it was: pass it with --model"):
        rotate_adapter(out, adapter, tmp_path / "two")
    rotate_adapter(out, adapter, tmp_path / "two", model=source)


def test_a_model_that_is_loaded_as_a_whole_has_the_files_of_a_stream(source, tmp_path):
    rotate_folder(source, tmp_path / "streamed", RotationSpec(), text=None, options=QUICK)
    loaded_as_a_whole(source, tmp_path / "whole")
    files = {"README.md", "config.json", "model.safetensors"}  # written anew
    streamed, whole = (
        {n for n in published(tmp_path / name) if "/" not in n} - files for name in ("streamed", "whole")
    )
    assert streamed == whole >= {"LICENSE", "chat_template.jinja", "tokenizer.json", "generation_config.json"}
    for name in (*whole, "extra/notes.txt"):
        assert (tmp_path / "whole" / name).read_bytes() == (source / name).read_bytes(), name
