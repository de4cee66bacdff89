"""Mutated folders give a SpinquantError or a right result; nothing outside OUT is touched, nothing left half-written.

Each test mutates files of folders that are right, and runs what reads them. A result is right if an independent reading
of the mutated files agrees: transformers loads source and result, and their logits are equal. `make test` tries few
mutations, the same ones each time; `make fuzz` tries new ones for an hour.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import mutations
import spinquant
from families import FAMILIES
from models import SIZES, random_weights
from spinquant import (
    LearnedRotations,
    Options,
    RotationSpec,
    SpinquantError,
    load,
    make_rotations,
    plan_of,
    quantize_folder,
    read_learned,
    rotate_adapter,
    rotate_folder,
)
from spinquant.checkpoint.checksums import check_checksums
from spinquant.checkpoint.run_directory import RunDirectory
from spinquant.entrypoints.learn import write_files

EXAMPLES = int(os.environ.get("SPINQUANT_FUZZ_EXAMPLES", "0"))  # for each test; 0: few, the same ones each time
FEW = 5
LONGEST = 120  # seconds of one example
MEMORY = 4 << 30  # bytes of address space that one example may add
CLOSE = 1e-3  # relative difference of logits in float32
SPEC = RotationSpec("R1,R2,R4")
QUICK = {"text": None, "options": Options(prove=False)}
IDS = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(0))

fuzzed = settings(
    max_examples=EXAMPLES or FEW,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,  # `limited` has its own
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model in two shards, the same rotated and quantized, rotations and an adapter for it; all that is mutated."""
    home = tmp_path_factory.mktemp("fuzzing") / "made"
    model = random_weights(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | SMALL)))
    model.save_pretrained(home / "model", max_shard_size="100KB")
    experts = random_weights(AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"].config(), dtype=torch.float32))
    experts.save_pretrained(home / "experts", max_shard_size="200KB")
    rotate_folder(home / "model", home / "rotated", RotationSpec("R1,R2"), **QUICK)
    quantize_folder(home / "model", home / "native", "W4A8KV4", SPEC, **QUICK)
    quantize_folder(home / "model", home / "online", "none", SPEC, **QUICK)
    record = {"kept": "random", "rotation_of": {"residual": "R1"}, "scores": {"random": {"kl": 1, "perplexity": 2}}}
    spec = RotationSpec("R1", "random-matrix")
    (home / "learned").mkdir()
    write_files(LearnedRotations(make_rotations(plan_of(model), spec), spec, record), home / "learned")
    (home / "lora").mkdir()
    names = [f"base_model.model.model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qo"]
    sizes = {"q": (48, 96), "o": (96, 48)}
    weights = {}
    for name in names:
        inputs, outputs = sizes[name[-6]]
        weights |= {f"{name}.lora_A.weight": torch.randn(2, inputs), f"{name}.lora_B.weight": torch.randn(outputs, 2)}
    save_file(weights, home / "lora/adapter_model.safetensors", metadata={"format": "pt"})
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "inference_mode": True}
    about |= {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 8}}
    (home / "lora/adapter_config.json").write_text(json.dumps(about))
    return home


SMALL = {"num_hidden_layers": 2, "vocab_size": 64}


@contextlib.contextmanager
def place(made):
    """A copy of everything, which an example may spoil."""
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        home = Path(folder) / "home"
        shutil.copytree(made, home)
        yield home


class Hang(BaseException):
    """An example took longer than it may."""


@contextlib.contextmanager
def limited():
    """Within the block, time and memory are limited."""

    def end(*_):
        raise Hang(f"longer than {LONGEST} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    handler = signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def everything(home, *, but=()):
    """Contents of every file, targets of links, names of folders and pipes, but for those below some names."""
    found = {}
    for folder, folders, files in os.walk(home.parent):
        for name in (*folders, *files):
            path = Path(folder) / name
            inside = path.relative_to(home.parent)
            if name == "lock" or any(part in but for part in inside.parts):
                continue
            kind = path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
            found[inside] = (path.lstat().st_mode, kind)
    return found


def attempt(home, action, right, *, out="out"):
    """The law: the action raises a SpinquantError and changes nothing, or gives what `right` accepts."""
    before = everything(home)
    try:
        with limited():
            result = action()
    except SpinquantError as error:
        assert str(error).strip(), "an error without a message"
        assert everything(home) == before, f"left behind after {error}"
        return None
    assert everything(home, but={out}) == {path: what for path, what in before.items() if out not in path.parts}
    assert not [path for path in home.rglob("*") if "spinquant-writing" in path.name or ".run" in path.name]
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right(result)
    return result


def readable(folder):
    """A folder with `metadata` in its index: transformers reads none that lacks it, though it means nothing."""
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_bytes()), "metadata": {}}))
    return folder


@torch.no_grad()
def logits(folder, adapter=None):
    """What transformers computes from a plain folder, and peft from an adapter for it."""
    loaded, info = AutoModelForCausalLM.from_pretrained(readable(folder), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")), info
    if adapter is not None:
        loaded = peft.PeftModel.from_pretrained(loaded, adapter)
    return computed(loaded)


@torch.no_grad()
def computed(model):
    """Logits of a model; the type of the error if it loads and does not run, as with fewer experts than it chooses."""
    try:
        return model.eval()(input_ids=IDS % model.config.vocab_size).logits
    except Exception as error:
        return type(error)


def assert_close(found, expected, tolerance=CLOSE):
    if isinstance(expected, type):
        assert found is expected
        return
    assert found.shape == expected.shape
    if not expected.isfinite().all():  # as from a norm whose epsilon is negative: there is nothing to preserve
        return
    error = float((found - expected).double().norm() / expected.double().norm())
    assert error <= tolerance or torch.equal(found, expected), f"logits are off by {error}"


MODEL = ["config.json", "model.safetensors.index.json", "a shard"]


def mutate(data, home, folder, file):
    """Put a mutation of one file of a folder in its place; "a shard": one of its weight files."""
    if file == "a shard":
        file = data.draw(st.sampled_from(sorted(path.name for path in (home / folder).glob("*.safetensors"))))
    mutations.write(data, home / folder / file, home / "outside")


@pytest.mark.parametrize("file", MODEL)
@fuzzed
@given(data=st.data())
def test_rotating_a_mutated_model(made, file, data):
    with place(made) as home:
        model = home / data.draw(st.sampled_from(["model", "experts"]), label="model")
        mutate(data, home, model, file)
        options = Options(prove=data.draw(st.booleans(), label="prove"))
        attempt(
            home,
            lambda: rotate_folder(model, home / "out", RotationSpec("R1,R2"), text=None, options=options),
            lambda _: assert_close(logits(home / "out"), logits(model)),
        )


@pytest.mark.parametrize("file", MODEL)
@fuzzed
@given(data=st.data())
def test_quantizing_a_mutated_model(made, file, data):
    """The stream makes what the same calls make of the model that transformers loads."""

    def right(_):
        plain = AutoModelForCausalLM.from_pretrained(readable(model))
        spinquant.quantize(plain, "W4A8", SPEC, options=Options(prove=False))
        assert_close(computed(load(home / "out")), computed(plain))

    with place(made) as home:
        model = home / data.draw(st.sampled_from(["model", "experts"]), label="model")
        mutate(data, home, model, file)
        attempt(home, lambda: quantize_folder(model, home / "out", "W4A8", SPEC, **QUICK), right)


@pytest.mark.parametrize("file", ["learned.json", "rotations.safetensors"])
@fuzzed
@given(data=st.data())
def test_mutated_learned_rotations(made, file, data):
    """Other rotations than those that were learned are right too: rotated by them, a model is the same function."""
    with place(made) as home:
        mutate(data, home, "learned", file)
        options = {"text": None, "options": Options(prove=data.draw(st.booleans(), label="prove"))}
        attempt(
            home,
            lambda: rotate_folder(
                home / "model", home / "out", RotationSpec(), learned=read_learned(home / "learned"), **options
            ),
            lambda _: assert_close(logits(home / "out"), logits(home / "model")),
        )


ADAPTER = ["lora/adapter_config.json", "lora/adapter_model.safetensors"]
RECORDS = ["record.json", "rotations.safetensors", ".source", "checksums.sha256"]
ROTATED = [f"rotated/spinquant/{file}" for file in RECORDS]


@pytest.mark.parametrize("file", [*ADAPTER, *ROTATED])
@fuzzed
@given(data=st.data())
def test_rotating_a_mutated_adapter(made, file, data):
    """peft computes the same logits from the original model and adapter, and from the rotated ones."""

    def right(_):
        try:
            expected = logits(home / "model", home / "lora")
        except Exception as error:  # words that this peft does not know: it has to refuse the rotated adapter too
            with pytest.raises(type(error)):
                logits(home / "rotated", home / "out")
        else:
            assert_close(logits(home / "rotated", home / "out"), expected)

    with place(made) as home:
        (home / "rotated/spinquant/.source").write_text(str(home / "model"))
        mutate(data, home, "", file)
        attempt(
            home,
            lambda: rotate_adapter(home / "rotated", home / "lora", home / "out"),
            right,
        )


def moved_config(home, folder):
    """The plain model with the config of a folder that is rotated online."""
    about = json.loads((home / folder / "config.json").read_text())
    about.pop("quantization_config")
    (home / "model/config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("file", MODEL)
@fuzzed
@given(data=st.data())
def test_loading_a_mutated_folder_with_online_rotations(made, file, data):
    """Equal to the model that it was made from, with the same config; `from_pretrained` gives the same."""

    def right(loaded):
        found = computed(loaded)
        assert_close(computed(AutoModelForCausalLM.from_pretrained(home / "online")), found, 0)
        if file == "config.json":
            moved_config(home, "online")
            assert_close(found, logits(home / "model"))

    with place(made) as home:
        mutate(data, home, "online", file)
        attempt(home, lambda: load(home / "online"), right, out=".none")


@pytest.mark.parametrize("file", MODEL)
@fuzzed
@given(data=st.data())
def test_loading_a_mutated_quantized_folder(made, file, data):
    """Its own settings are those that it was written with, or refused."""

    def right(loaded):
        found, path = computed(loaded), home / "native/config.json"
        assert_close(computed(AutoModelForCausalLM.from_pretrained(home / "native")), found, 0)
        about, before = (json.loads(p.read_text()) for p in (path, made / "native/config.json"))
        clips, about["quantization_config"] = about["quantization_config"].get("clips"), before["quantization_config"]
        if file == "config.json" and not clips:
            path.write_text(json.dumps(about))
            assert_close(found, computed(load(home / "native")), 0)

    with place(made) as home:
        mutate(data, home, "native", file)
        attempt(home, lambda: load(home / "native"), right, out=".none")


@fuzzed
@given(data=st.data())
def test_verifying_mutated_checksums(made, data):
    """What differs is what hashlib finds to differ."""

    def right(damaged):
        lines = (home / "native/spinquant/checksums.sha256").read_text().split("\n")
        found = [re.fullmatch(r"\\?([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line.strip()) for line in lines]
        listed = {match[2]: match[1].lower() for match in found if match}
        now = {name: home / "native" / name for name in listed}
        differs = [
            name
            for name, path in now.items()
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != listed[name]
        ]
        assert sorted(damaged) == sorted(differs)

    with place(made) as home:
        file = data.draw(st.sampled_from(["spinquant/checksums.sha256", "config.json", "a shard"]), label="file")
        mutate(data, home, "native", file)
        attempt(home, lambda: check_checksums(home / "native"), right, out=".none")


@pytest.fixture(scope="module")
def killed(made):
    """The same, with what a kill leaves of a run after its first shard; names are relative, as in settings."""

    class Kill(BaseException):
        pass

    def finish(run, *given, **options):
        finished(run, *given, **options)
        raise Kill

    home = made.parent / "killed"
    shutil.copytree(made, home)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(home):
        finished = RunDirectory.finish
        patch.setattr(RunDirectory, "finish", finish)
        with contextlib.suppress(Kill):
            rotate_folder("model", "out", RotationSpec("R1,R2"), **QUICK)
    assert (home / ".out.run/settings.json").exists()
    return home


@fuzzed
@given(data=st.data())
def test_resuming_from_a_mutated_run(killed, data):
    """The result is the one of a run without an interruption, or the error leaves no result."""
    with place(killed) as home, contextlib.chdir(home):
        state = sorted(path for path in (home / ".out.run").rglob("*") if path.is_file() and path.name != "lock")
        mutations.write(data, data.draw(st.sampled_from(state), label="file"), home / "outside")
        before = everything(home, but={".out.run"})
        try:
            with limited():
                rotate_folder("model", "out", RotationSpec("R1,R2"), **QUICK)
        except SpinquantError:
            assert everything(home, but={".out.run"}) == before
        else:
            assert everything(home, but={"out"}) == {p: w for p, w in before.items() if "out" not in p.parts}
            found, expected = (
                {p.name: p.read_bytes() for p in (home / f).glob("*") if p.is_file()} for f in ("out", "rotated")
            )
            assert found == expected
