"""What the code promises about itself: imports point one way, the public names are what __all__ says."""

import ast
import importlib
from pathlib import Path

import spinquant

SOURCE = Path(spinquant.__file__).parent

TABLES = {
    f"architectures.{name}"
    for name in (
        "llama",
        "postnorm",
        "layernorm",
        "moe",
        "hybrid",
        "delta_latent",
        "hyperconnected",
        "relatives",
        "vision",
        "untabled",
    )
}

# Lowest first; a module imports from lower or equal layers only.
LAYERS = [
    {"errors", "workspace", "threads", "direct"},
    {"atomic"},
    {"plots", "processes", "hidden_states"},
    {"tensorfile", "source_hash"},
    {"plan", "butterflies", "galois", "hadamard_bases", "kronecker", "hadamard", "quantization.scheme"},
    {"centred"},
    {"rotation", "quantization.floating", "quantization.integer", "quantization.progress", "learning.cayley"},
    {"wrapped"},
    {"saved_rotations", "quantization.rotated", "learning", "learning.objectives", "learning.state"},
    {
        "fuse",
        "architectures",
        "architectures.table",
        "architectures.build",
        "architectures.shared_blocks",
        "architectures.prediction",
        "architectures.family_file",
        *TABLES,
    },
    {
        "module",
        "cache",
        "calibrate",
        "quantization",
        "quantization.weights",
        "quantization.rtn",
        "sites",
        "online",
        "vllm_plugin",
    },
    {"blocks", "quantization.experts", "quantization.gptq", "quantization.clip", "evaluation"},
    {"learning.network", "learning.samples"},
    {"learning.sensitivity"},
    {"learning.scales"},
    {"learning.judge", "learning.local"},
    {"learning.end_to_end"},
    {"learning.options"},
    {"learning.learned"},
    {"learning.learn"},
    {
        "proof",
        "twin",
        "formats",
        "formats.native",
        "formats.compressed_config",
        "formats.compressed_reader",
        "formats.compressed_tensors",
        "formats.runtimes",
        "checkpoint",
        "tasks",
        "quantization.ranges",
        "quantization.blockwise",
    },
    {"mappings", "learnable", "source", "resumable", "stored_form"},
    {"formats.native_packing", "shards"},
    {"formats.compressed_packing"},
    {"sharing", "disk_model"},
    {"stream"},
    {"along", "along.counterparts", "along.target", "along.experts", "along.lora", "along.heads", "along.folder"},
    {"disk_proof"},
    {"disk_rounding"},
    {"mapped_plan", "transform_config", "probing", "probing.trace"},
    {"probing.stacks", "probing.kinds", "probing.factors"},
    {"probing.explain"},
    {"probing.seen"},
    {"probing.branches"},
    {"probing.roles", "probing.checkpoints"},
    {"probing.probe"},
    {"probing.draft"},
    {"pipeline", "demo_model"},
    {"companions", "disk_calibration"},
    {"stream_run"},
    {"streamed_folders"},
    {"preparation", "preconditions", "learning.keeping"},
    {"learning.folder"},
    {"folders"},
    {"modifier", "llmcompressor"},
    {"report", "demo", "demo_page"},
    {"cli_output"},
    {"cli_options"},
    {"cli_learn", "cli_quantize", "cli_along", "cli_probe"},
    {"cli"},
    {"__main__"},
]


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spinquant":
            module = (node.module or "").removeprefix("spinquant").lstrip(".")
            names |= {module} if module else {alias.name for alias in node.names if alias.name in modules()}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("spinquant.") for a in node.names if a.name.startswith("spinquant.")}
    return names


def test_every_module_has_a_layer_and_imports_downwards():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert set(modules()) == set(level)
    for name, path in modules().items():
        for imported in imports(path):
            assert level[imported] <= level[name], f"{name} imports {imported}"


def test_the_plan_needs_no_torch():
    tables = [name for name in modules() if name.startswith("architectures")]
    assert len(tables) > 3
    for name in ("plan", *tables, "quantization.scheme"):
        assert "torch" not in modules()[name].read_text().replace("no torch", ""), name


def test_the_core_needs_no_runtime():
    """vLLM, compressed-tensors and llm-compressor are extras: nothing imports them before they are needed."""
    for name, path in modules().items():
        if name == "llmcompressor":  # itself imported by those alone who have all of it, as the next assertion says
            continue
        for node in ast.parse(path.read_text()).body:
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            outside = {i.split(".")[0] for i in imported}
            assert not outside & {"vllm", "compressed_tensors", "llmcompressor"}, name
            assert "numba" not in outside or name == "butterflies", name
            assert "spinquant.rotations.numba_kernels" not in imported, name
            assert "spinquant.modifiers.llmcompressor" not in imported, name


def test_what_benchmarks_and_examples_import_is_there():
    """No test runs them: a name that has moved would be noticed by their next user."""
    files = [path for folder in ("benchmarks", "examples") for path in (SOURCE.parents[1] / folder).rglob("*.py")]
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spinquant"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    inside = f"{node.module}.{name.name}" in {f"spinquant.{m}" for m in modules()}
                    assert hasattr(module, name.name) or inside, f"{path.name}: {node.module}.{name.name}"


def test_public_names_are_what_all_says():
    public = {name for name in vars(spinquant) if not name.startswith("_")} - set(modules()) - {"version"}
    public -= {name.split(".")[0] for name in modules()}
    assert public <= set(spinquant.__all__)
    assert sorted(spinquant.__all__) == spinquant.__all__
    assert all(hasattr(spinquant, name) for name in spinquant.__all__)


def test_public_names_have_docstrings():
    for name in spinquant.__all__:
        thing = getattr(spinquant, name)
        if callable(thing):
            assert (thing.__doc__ or "").strip(), name


def test_hooks_and_registrations_are_where_they_belong():
    for name, path in modules().items():
        text = path.read_text()
        if name not in ("online", "calibrate", "probing.trace", "vllm_plugin"):
            assert "register_forward" not in text, name
        assert "import *" not in text, name
