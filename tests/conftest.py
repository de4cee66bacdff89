"""Fixtures that all tests share; the models are in `models.py`."""

import itertools
import os
import sys
from pydoc_data import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported, which reads it then
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from models import byte_tokenizer, tiny_model
from spinquant.cli import main as cli
from spinquant.demo.model import demo_model
from spinquant.errors import CheckpointError

transformers.utils.logging.disable_progress_bar()  # as the command line does


@pytest.fixture(autouse=True)
def short_manual(monkeypatch):
    """The text `manual` with its first topics alone: to tokenize all of it takes longer than most tests."""
    first = dict(itertools.islice(sorted(topics.topics.items()), 12))
    monkeypatch.setattr(topics, "topics", first)


@pytest.fixture
def folder(tmp_path):
    """A saved tiny Llama in float32 with tied embeddings, and its tokenizer."""
    model = tiny_model("llama-tied", dtype=torch.float32)
    path = tmp_path / "model"
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def real_folder():
    """SmolLM2-135M-Instruct, downloaded once."""
    try:
        return demo_model()
    except CheckpointError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no real model: {error}")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["spinquant", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def small_pieces(monkeypatch):
    """Streams cut tiny tensors too, into several slices and bands."""
    monkeypatch.setattr("spinquant.rotations.fuse.SLICE", 600)
    monkeypatch.setattr("spinquant.streaming.pipeline.BAND", 5000)
    monkeypatch.setattr("spinquant.streaming.pipeline.IN_FLIGHT", 20_000)
    monkeypatch.setattr("spinquant.formats.native_packing.PIECE", 500)
