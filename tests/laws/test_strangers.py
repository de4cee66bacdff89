"""A folder from a stranger, or a wrong argument, gives a SpinquantError and writes nothing; it never gives a result."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import spinquant
from families import FAMILIES
from models import SIZES
from spinquant import (
    ArchitectureError,
    CalibrationText,
    CheckpointError,
    LearnedRotations,
    LearnOptions,
    Options,
    Quantizer,
    RotationError,
    RotationSpec,
    SchemeError,
    SpinquantError,
    TextError,
    learn,
    load,
    make_rotations,
    parse_scheme,
    plan_of,
    quantize_folder,
    read_learned,
    rotate_adapter,
    rotate_folder,
)
from spinquant.architectures.family_file import family_from
from spinquant.checkpoint.checksums import check_checksums
from spinquant.checkpoint.folder import load_config
from spinquant.compute.patterns import LONGEST_NAME, check_pattern
from spinquant.entrypoints.learn import write_files
from spinquant.formats.native import SpinQuantConfig
from spinquant.quantization.scheme import Clips, Scheme

QUICK = {"text": None, "options": Options(prove=False)}
SMALL = {**SIZES, "num_hidden_layers": 2, "vocab_size": 64}
SPEC = RotationSpec("R1,R2,R4")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, the same rotated, quantized in the native format, and an adapter and rotations for it."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("strangers")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    model.save_pretrained(home / "model")
    rotate_folder(home / "model", home / "rotated", RotationSpec("R1,R2"), **QUICK)
    quantize_folder(home / "model", home / "native", parse_scheme("W4A8KV4"), SPEC, **QUICK)
    record = {"kept": "random", "rotation_of": {"residual": "R1"}, "scores": {"random": {"kl": 1, "perplexity": 2}}}
    spec = RotationSpec("R1", "random-matrix")
    (home / "learned").mkdir()
    write_files(LearnedRotations(make_rotations(plan_of(model), spec), spec, record), home / "learned")
    (home / "lora").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{name}.lora_A.weight": torch.randn(2, 48), f"{name}.lora_B.weight": torch.randn(96, 2)}
    save_file(weights, home / "lora/adapter_model.safetensors")
    (home / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return home


@pytest.fixture
def place(made, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def change(path, **values):
    data = json.loads(path.read_text())
    for key, value in values.items():
        *parts, last = key.split("__")
        inside = data
        for part in parts:
            inside = inside[part]
        inside[last] = value
    path.write_text(json.dumps(data))


def change_tensors(path, function):
    tensors = load_file(path)
    function(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def refused(place, action, word=None):
    """The action raises a SpinquantError, and leaves every file as it was and no new one."""
    before = everything(place)
    with pytest.raises(SpinquantError, match=word) as caught:
        action()
    assert everything(place) == before
    return caught.value


def test_what_is_not_spoilt_is_accepted(place):
    read_learned(place / "learned")
    load(place / "native")
    assert check_checksums(place / "native") == []
    rotate_adapter(place / "rotated", place / "lora", place / "out-lora")
    options = {**QUICK, "options": Options()}
    rotate_folder(place / "model", place / "out", None, learned=read_learned(place / "learned"), **options)


CONFIGS = {
    "kv heads": {"num_key_value_heads": 3},
    "heads": {"num_attention_heads": 4},
    "head size": {"head_dim": 8},
    "head size of the whole": {"head_dim": 96},
    "vocabulary": {"vocab_size": 65},
    "hidden size": {"hidden_size": 24},
    "intermediate size": {"intermediate_size": 40},
    "activation": {"hidden_act": "nonsense"},
    "activation of another type": {"hidden_act": 3},
    "rope": {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
    "dtype": {"dtype": "float7"},
    "a dtype of another type": {"dtype": False},
    "a dtype that is a number": {"dtype": 2},
    "a text part of another type": {"text_config": 0.5},
    "no layers": {"num_hidden_layers": 0},
    "more layers": {"num_hidden_layers": 3},
    "10^7 layers": {"num_hidden_layers": 10**7},
    "10^30 layers": {"num_hidden_layers": 10**30},
    "one layer": {"num_hidden_layers": 1},
    "layers as text": {"num_hidden_layers": "2"},
    "heads null": {"num_attention_heads": None},
    "no heads": {"num_attention_heads": 0},
    "a list of architectures": {"architectures": 3},
    "half a surrogate pair": {"note": "\ud800"},
    "a family": {"spinquant_family": 3},
    "a family with a slow pattern": {
        "spinquant_family": {
            "name": "x",
            "model_types": ["llama"],
            "like": "llama",
            "stored": [["(.+.*)+\\.(.+.*)+\\.zz", "x"]],
        }
    },
}


def processor_time(run):
    """Seconds that the processor works on `run`, whatever else it works on."""
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.fixture(scope="module")
def usual(made, tmp_path_factory):
    """The processor time of rotating the unharmed folder, with the proof on a tiny model."""
    out = tmp_path_factory.mktemp("usual") / "out"
    return processor_time(lambda: rotate_folder(made / "model", out, RotationSpec("R1"), text=None))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_contradicts_the_weights_is_refused(place, name, usual):
    """And not after much work: a config can ask for any amount of it."""
    change(place / "model/config.json", **CONFIGS[name])
    for options in (Options(prove=False), Options()):
        given = {"text": None, "options": options}
        attempt = lambda given=given: rotate_folder(  # noqa: E731
            place / "model", place / "out", RotationSpec("R1"), **given
        )
        assert processor_time(lambda attempt=attempt: refused(place, attempt)) < 10 * usual


@pytest.mark.parametrize("given", [{"num_hidden_layers": 10**5}, {"text_config": {"num_mtp_layers": 10**5}}])
def test_a_number_of_layers_for_which_lists_would_fill_the_memory_is_refused(place, given):
    """Config classes make a list of layer types as long as that."""
    change(place / "model/config.json", **given)
    refused(place, lambda: load_config(place / "model"), "= 100000: expected at most 10000")


WEIGHTS = {
    "integer weights": lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(80, 48, dtype=torch.int8)}),
    "an integer norm": lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int64)}),
    "a boolean embedding": lambda t: t.update({"model.embed_tokens.weight": torch.ones(64, 48, dtype=torch.bool)}),
    "an empty q_proj": lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(0, 48)}),
    "another q_proj": lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(48, 48)}),
    "a square norm": lambda t: t.update({"model.norm.weight": torch.ones(48, 1)}),
    "a missing bias": lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(7)}),
    "a missing layer": lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
    "a long name": lambda t: t.update({"x" * 5000: torch.ones(1)}),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_contradict_the_config_are_refused(place, name):
    change_tensors(place / "model/model.safetensors", WEIGHTS[name])
    refused(place, lambda: rotate_folder(place / "model", place / "out", RotationSpec("R1"), **QUICK))


def test_a_config_that_asks_for_tensors_that_the_checkpoint_lacks_is_refused(tmp_path):
    """It was written with the note that logits are not compared; which layers have experts is in the config alone."""
    AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"].config()).save_pretrained(tmp_path / "model")
    rotate_folder(tmp_path / "model", tmp_path / "whole", RotationSpec("R1"), **QUICK)
    for layers in ([], [0, 1]):
        change(tmp_path / "model/config.json", mlp_only_layers=layers)
        refused(
            tmp_path,
            lambda: rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R1"), **QUICK),
            r"has no tensor 'model\.layers",
        )


LEARNED = {
    "rotations": [3, None, "x", [3], [{"kind": 3}], [{}], {"a": 1}],
    "spaces": [3, None, {"residual": "0"}, {"residual": -1}, {"residual": 5}, {"residual": None}, []],
    "scaled": [3, ["residual"], [3], {"a": 1}],
    "spec": [3, None, {"rotations": 3}, {"rotations": [3]}, {"seed": "x"}, {"block_size": 1.5}, {"x": 1}],
    "kept": [3, None, []],
    "rotation_of": [3, [], {"residual": 3}],
    "scores": [3, {"random": 3}, {"random": {"kl": "x", "perplexity": 1}}],
    "scheme": [3, {"weights": 3}, {"weights": {"bits": "4"}}, {"x": 1}, []],
    "steps": [3, [3]],
    "tokens": [3, {"text": 3}],
    "weights": [3, []],
    "options": [3, {"end_to_end": 3}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in LEARNED.items() for value in values])
def test_a_learned_json_of_other_types_is_refused(place, key, value):
    change(place / "learned/learned.json", **{key: value})
    refused(place, lambda: read_learned(place / "learned"))


@pytest.mark.parametrize("factor", [3, 0, float("nan"), 1.001])
def test_a_matrix_that_is_not_orthogonal_is_refused_wherever_it_is_read(place, factor):
    def spoil(tensors):
        tensors.update({name: tensor * factor for name, tensor in tensors.items()})

    change_tensors(place / "learned/rotations.safetensors", spoil)
    refused(place, lambda: read_learned(place / "learned"), "orthogonal")
    change_tensors(place / "rotated/spinquant/rotations.safetensors", lambda t: t.update({"0.signs": t["0.signs"] * 3}))
    refused(place, lambda: rotate_adapter(place / "rotated", place / "lora", place / "out"), "signs")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plan", 3),
        ("plan", {}),
        ("plan", {"spaces": 3}),
        ("plan", {"spaces": []}),
        ("source", 3),
        ("source", "a\0b"),
        ("rotations", []),
        ("spaces", {}),
        ("spaces", None),
    ],
)
def test_a_record_of_other_types_is_refused(place, key, value):
    (place / "rotated/spinquant/.source").unlink()
    change(place / "rotated/spinquant/record.json", **({"source": str(place / "model")} | {key: value}))
    refused(place, lambda: rotate_adapter(place / "rotated", place / "lora", place / "out"))


ADAPTERS = {
    "r": ["x", 0, -1, None, [2], 3],
    "lora_alpha": ["x", None, []],
    "rank_pattern": [3, {"q_proj": "x"}, {"q_proj": 0}, {"(a+)+$": 2}, {"(": 2}, []],
    "alpha_pattern": [{"(a|a)*b": 2}, {".*.*.*.*.*.*x": 1}],
    "peft_type": [3, None, "IA3"],
    "use_rslora": [[]],
    "task_type": [[], 3],
    "target_modules": [3, True, [3]],
    "modules_to_save": [3, "embed_tokens"],
    "layers_to_transform": ["x"],
    "bias": ["x", 3],
    "init_lora_weights": ["pissa"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ADAPTERS.items() for value in values])
def test_an_adapter_config_of_other_types_is_refused(place, key, value):
    change(place / "lora/adapter_config.json", **{key: value})
    refused(place, lambda: rotate_adapter(place / "rotated", place / "lora", place / "out"))


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.update({name: tensor.long() for name, tensor in t.items()}),
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(2)}),
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(())}),
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 24)}),
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 96)}),
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 0)}),
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 2, 2, 48)}),
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 48, 1)}),
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(3, 48)}),
        lambda t: t.update({f"{Q_PROJ}.lora_B.weight": torch.ones(96, 3)}),
        lambda t: t.update({f"{Q_PROJ}.lora_B.weight": torch.ones(95, 2)}),
        lambda t: t.update({f"{Q_PROJ}.lora_B.weight": torch.ones(1, 96, 2)}),
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.default.weight.x": torch.ones(2, 48)}),
    ],
)
def test_tensors_of_an_adapter_that_do_not_fit_are_refused(place, spoil):
    change_tensors(place / "lora/adapter_model.safetensors", spoil)
    refused(place, lambda: rotate_adapter(place / "rotated", place / "lora", place / "out"))


NATIVE = {
    "no spaces": {"quantization_config__spaces": {}},
    "spaces of other types": {"quantization_config__spaces": {"layers.0.hidden": "x"}},
    "spaces beyond": {"quantization_config__spaces": {"layers.0.hidden": 0, "layers.1.hidden": 9}},
    "no rotations": {"quantization_config__rotations": []},
    "rotations of other types": {"quantization_config__rotations": [3]},
    "another order": {"quantization_config__rotations": [{"kind": "random-hadamard", "order": 40}]},
    "a great order": {"quantization_config__rotations": [{"kind": "random-hadamard", "order": 10**30}]},
    "an unknown kind": {"quantization_config__rotations": [{"kind": "x", "order": 80}]},
    "scheme of other types": {"quantization_config__scheme": {"weights": {"bits": "4"}}},
    "scheme with another width": {"quantization_config__scheme__weights__bits": 8},
    "spec of other types": {"quantization_config__spec": {"rotations": 3}},
    "spec without R4": {"quantization_config__spec__rotations": ["R1", "R2"]},
    "clips of other types": {"quantization_config__clips": {"inputs": 3}},
    "negative clips": {"quantization_config__clips": {"inputs": {"model.layers.0.mlp.down_proj": -1.0}}},
    "version of another type": {"quantization_config__format_version": "x"},
    "a later version": {"quantization_config__format_version": 10**6},
    "an unknown key": {"quantization_config__x": 1},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_folder_whose_config_is_wrong_does_not_load(place, name):
    change(place / "native/config.json", **NATIVE[name])
    refused(place, lambda: load(place / "native"))


@pytest.mark.parametrize("key", ["scheme", "spec", "rotations", "spaces", "clips", "format_version"])
def test_settings_of_a_native_folder_have_their_types(key):
    """`from_pretrained` of transformers reads them too, and wraps no error."""
    right = {"scheme": {}, "spec": {}, "rotations": [], "spaces": {}, "clips": {}, "format_version": 1}
    SpinQuantConfig(**right)
    with pytest.raises(CheckpointError, match=f"the quantization_config of a native folder: key {key}"):
        SpinQuantConfig(**{**right, key: "x"})


@pytest.mark.parametrize(
    ("ending", "function"),
    [
        ("signs", lambda x: x * 0),
        ("signs", lambda x: x * 3),
        ("signs", lambda x: x[:40]),
        ("q_proj.weight_scale", lambda x: -x),
        ("q_proj.weight_scale", lambda x: x * float("nan")),
        ("q_proj.weight_scale", lambda x: x * float("inf")),
        ("q_proj.weight_scale", lambda x: x * 0),
        ("q_proj.weight", lambda x: x[:, :1]),
        ("model.norm.weight", lambda x: x * float("nan")),
    ],
)
def test_a_native_folder_whose_tensors_are_wrong_does_not_load(place, ending, function):
    def spoil(tensors):
        found = [name for name in tensors if name.endswith(ending)]
        assert found
        tensors.update({name: function(tensors[name]) for name in found})

    change_tensors(place / "native/model.safetensors", spoil)
    refused(place, lambda: load(place / "native"))


def test_checksums_that_are_no_list_of_the_folder_are_refused(place):
    listed = place / "native/spinquant/checksums.sha256"
    lines = listed.read_text().splitlines(keepends=True)
    for content in (b"", b"\xff\xfe\0", b"x\n", "".join(lines[:1]).encode()):
        listed.write_bytes(content)
        refused(place, lambda: check_checksums(place / "native"))
    listed.write_text("".join(lines) + "0" * 64 + "  ../../secret\n")
    refused(place, lambda: check_checksums(place / "native"))
    listed.write_text("".join(lines).replace(lines[-1][:64], "0" * 64))
    assert check_checksums(place / "native") == [lines[-1][66:].strip()]


@pytest.mark.parametrize("seed", ["x", None, True, 1.5, -1, 2**70])
def test_a_seed_is_an_integer_that_torch_takes(seed):
    for error, maker in (
        (RotationError, lambda: RotationSpec("R1", seed=seed)),
        (TextError, lambda: CalibrationText(seed=seed)),
        (SpinquantError, lambda: LearnOptions(seed=seed)),
    ):
        with pytest.raises(error, match="seed"):
            maker()


@pytest.mark.parametrize(
    "text", ["W\u0664A4", "W4A\u0661\u0666", "W\u00b2", "\u212aV4", "W4" + "0" * 200, 4, None, b"W4A4"]
)
def test_a_scheme_is_ascii_text(text):
    with pytest.raises(SchemeError, match="cannot parse scheme"):
        parse_scheme(text)


@pytest.mark.parametrize(
    "given", [{"bits": "4"}, {"bits": True}, {"bits": 4, "group_size": 1.5}, {"bits": 4, "clip": "x"}]
)
def test_a_quantizer_has_integers(given):
    with pytest.raises(SchemeError):
        Quantizer(**given)
    with pytest.raises(SchemeError):
        Scheme.from_dict({"weights": given})


@pytest.mark.parametrize("data", [3, {"inputs": 3}, {"inputs": {"x": "y"}}, {"inputs": {"x": -1.0}}, {"x": {}}])
def test_clips_are_positive_numbers(data):
    with pytest.raises(SchemeError):
        Clips.from_dict(data)


@pytest.mark.parametrize(
    "given", [{"samples": 10**9}, {"samples": 0}, {"samples": 1.5}, {"length": 1}, {"samples": True}, {"length": 2**40}]
)
def test_a_calibration_that_fits_no_memory_is_refused(given):
    with pytest.raises(TextError, match="expected"):
        CalibrationText(**given)


def test_a_pipe_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match="not a regular file"):
        spinquant.load_text(str(tmp_path / "pipe"))


TOKENS = {
    "beyond the vocabulary": torch.full((4, 8), 64),
    "negative": torch.full((4, 8), -1),
    "floats": torch.zeros(4, 8),
    "booleans": torch.zeros(4, 8, dtype=torch.bool),
    "one axis": torch.zeros(8, dtype=torch.int64),
    "three axes": torch.zeros(4, 8, 1, dtype=torch.int64),
    "none": torch.zeros(0, 8, dtype=torch.int64),
    "empty": torch.zeros(4, 0, dtype=torch.int64),
    "a list": [[1, 2]],
}
SCHEME = parse_scheme("W4A8")
MODELS = {"None": None, "a linear": nn.Linear(4, 4), "text": "model", "a class": LlamaConfig}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))


def calls(model, ids, good):
    """The functions that read a model and tokens."""
    return {
        "rotate": lambda: spinquant.rotate(model, RotationSpec("R1"), sample=ids),
        "quantize": lambda: spinquant.quantize(model, "W4A8", method="gptq", tokens=ids),
        "quantize, sample": lambda: spinquant.quantize(model, "W4A8", sample=ids),
        "evaluate": lambda: spinquant.evaluate(model, ids),
        "compare": lambda: spinquant.compare_models(model, model, ids),
        "learn": lambda: learn(model, SCHEME, RotationSpec("R1"), ids, good),
        "learn, held out": lambda: learn(model, SCHEME, RotationSpec("R1"), good, ids),
    }


@pytest.mark.parametrize("name", TOKENS)
def test_wrong_tokens_are_refused_before_anything_is_changed(model, name):
    good, before = torch.zeros(4, 8, dtype=torch.int64), {k: v.clone() for k, v in model.state_dict().items()}
    for what, call in calls(model, TOKENS[name], good).items():
        with pytest.raises(SpinquantError):
            pytest.fail(f"{what} returned {call()}")
    assert all(torch.equal(tensor, before[k]) for k, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model_is_refused(name):
    good = torch.zeros(4, 8, dtype=torch.int64)
    others = {"plan_of": lambda: plan_of(MODELS[name]), "evaluate": lambda: spinquant.evaluate(MODELS[name], good)}
    for what, call in (calls(MODELS[name], good, good) | others).items():
        with pytest.raises(ArchitectureError, match="expected a causal language model"):
            pytest.fail(f"{what} returned {call()}")


SLOW = [r"(a+)+$", r"(a|a)*b", "(a?){50}a{50}", "a?" * 50 + "a" * 50, ".*.*.*.*x", r"(a)\1*", "(?=(a+)+)b", "(x+x+)+y"]
FAST = [
    r"(.*)\.layers\.(\d+)\.(.*)",
    r"^(wte|wpe|h|ln_f)\.",
    r"\.experts\.(\d+)\.w1\.",
    "(?:x|y)?z",
    r"[^.]+\.x",
    ".*q_proj",
]


def test_patterns_that_may_run_for_hours_are_refused():
    for pattern in (*SLOW, "(", "a" * 1000, "(?P<a>x)(?P<a>y)"):
        with pytest.raises(ArchitectureError, match="pattern"):
            check_pattern(pattern, "the file", ArchitectureError)
    for pattern in FAST:
        check_pattern(pattern, "the file", ArchitectureError)


def test_patterns_that_are_accepted_take_seconds_at_most():
    """The slowest that are allowed take a polynomial of the name's length: for each repeat once more its length."""
    import re

    name = "a" * LONGEST_NAME
    two_repeats = processor_time(lambda: re.sub(".*.*x", "", name))
    for pattern in (".*.*.*x", "(?:a|a)" * 7 + "b", "a?" * 7 + "x"):
        check_pattern(pattern, "the file", ArchitectureError)
        assert processor_time(lambda pattern=pattern: re.sub(pattern, "", name)) < LONGEST_NAME * two_repeats


def test_patterns_of_built_in_families_are_accepted():
    from spinquant.architectures import FAMILIES

    for family in FAMILIES:
        for pattern in (*family.ignored, *(pattern for pattern, _ in family.stored)):
            check_pattern(pattern, family.name, ArchitectureError)


@pytest.mark.parametrize("replacement", [r"\9", "x" * 300, r"\g<0>" * 60])
def test_replacements_that_cannot_be_made_are_refused(place, replacement):
    family = {"name": "x", "model_types": ["llama"], "like": "llama", "stored": [["layers", replacement]]}
    family["stored"] *= 5
    family_from(family, "the file")
    change(place / "model/config.json", spinquant_family=family)
    refused(place, lambda: rotate_folder(place / "model", place / "out", RotationSpec("R1"), **QUICK))


def test_a_damaged_piece_of_a_run_is_refused_with_the_way_out(tmp_path):
    from spinquant.checkpoint.run_pieces import Pieces

    pieces = Pieces(tmp_path / "stage", [1])
    pieces.save("block", {"x": torch.ones(3)}, {"a": 1})
    pieces.path("block").write_bytes(b"no safetensors")
    for read in (pieces.load, pieces.about):
        with pytest.raises(CheckpointError, match="to start anew"):
            read("block")
