"""What the code promises about itself: packages import one way, tests mirror the source, names are documented."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spinquant

SOURCE = Path(spinquant.__file__).parent
TESTS = Path(__file__).parent

# Lowest first: a module imports from its own package and from those before it.
PACKAGES = [
    "errors",
    "rotation_names",
    "plan",
    "compute",
    "architectures",
    "models",
    "checkpoint",
    "rotations",
    "quantization",
    "online",
    "evaluation",
    "calibration",
    "formats",
    "streaming",
    "adapters",
    "learning",
    "probing",
    "entrypoints",
    "modifiers",
    "integrations",
    "demo",
    "cli",
    "moved",
    "__main__",
]
# Attributes of the package that are functions: a subpackage of that name would replace them when it is imported.
FUNCTIONS = {"rotate", "quantize", "learn", "evaluate", "probe", "prove", "attach", "detach", "load", "save", "gptq"}
# Modules that need an extra; none is imported before that extra is known to be there.
OPTIONAL = ("modifiers.llmcompressor", "modifiers.compressed_transforms", "moved.llmcompressor")
HOOKS = ("online.hooks", "formats.training", "models.capture", "probing.trace", "integrations.vllm")


def modules() -> dict[str, Path]:
    """Every module but the package itself, by its name within the package."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, the ones given as strings to importlib too."""
    known, names = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spinquant":
            module = (node.module or "").removeprefix("spinquant").lstrip(".")
            inner = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            names |= {one if one in known else module for one in inner}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("spinquant.") for a in node.names if a.name.startswith("spinquant.")}
    assert "" not in names, f"{name} imports a name from the package itself: import it from its module"
    return names & set(known)


def test_packages_import_downwards():
    level = {name: i for i, name in enumerate(PACKAGES)}
    assert {name.split(".")[0] for name in modules()} == set(PACKAGES)
    for name, path in modules().items():
        for imported in imports(name, path):
            assert level[imported.split(".")[0]] <= level[name.split(".")[0]], f"{name} imports {imported}"


def test_no_module_imports_itself_in_a_circle():
    edges = {name: imports(name, path) - {name} for name, path in modules().items()}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for imported in sorted(edges[name]):
                walk(imported, (*above, name))
            done.add(name)

    for name in edges:
        walk(name, ())


def test_few_files_lie_beside_the_packages_and_none_bears_the_name_of_a_function():
    assert len(list(SOURCE.glob("*.py"))) <= 6
    assert FUNCTIONS <= set(spinquant.__all__)
    assert not FUNCTIONS & {name.split(".")[0] for name in modules()}


def test_tests_mirror_the_source():
    """A test file lies in the folder of the package that it is about; laws across packages lie in `laws`."""
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    for path in TESTS.rglob("test_*.py"):
        assert path.parent == TESTS or path.parent.name in packages | {"laws", "contracts"}, path
    assert [path.name for path in TESTS.glob("test_*.py")] == [Path(__file__).name]


def test_the_plan_needs_no_torch():
    tables = [name for name in modules() if name.startswith("architectures")]
    assert len(tables) > 3
    for name in ("plan", *tables, "quantization.scheme"):
        assert "torch" not in modules()[name].read_text().replace("no torch", ""), name


def test_the_core_needs_no_runtime():
    """vLLM, compressed-tensors and llm-compressor are extras: nothing imports them before they are needed."""
    for name, path in modules().items():
        if name in OPTIONAL:
            continue
        for node in ast.parse(path.read_text()).body:
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            outside = {i.split(".")[0] for i in imported}
            assert not outside & {"vllm", "compressed_tensors", "llmcompressor"}, name
            assert "numba" not in outside or name == "rotations.numba_kernels", name
            assert not {f"spinquant.{one}" for one in (*OPTIONAL, "rotations.numba_kernels")} & set(imported), name


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
    """What type checkers see, where the names are imported from, and `__all__` are three lists of the same names."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    places = {name: f"spinquant.{module}" for name, module in spinquant._MODULES.items()}
    assert {name: place.rpartition(".")[0] for name, place in seen.items()} == places
    assert {*seen, "__version__"} == set(spinquant.__all__) == set(dir(spinquant))
    assert sorted(spinquant.__all__) == spinquant.__all__
    for name, place in seen.items():
        module, _, attribute = place.rpartition(".")
        assert getattr(spinquant, name) is getattr(importlib.import_module(module), attribute)
    assert spinquant.__version__ == importlib.metadata.version("spinquant")
    with pytest.raises(AttributeError, match="no attribute 'rotat'"):
        _ = spinquant.rotat


def test_import_paths_of_earlier_versions_work():
    paths = sorted(path.stem for path in (SOURCE / "moved").glob("*.py") if path.stem != "__init__")
    assert paths == ["demo_model", "hadamard", "llmcompressor"]
    for name in {*paths} - {"llmcompressor"}:  # which tests/integrations imports, where llm-compressor is installed
        module = importlib.import_module(f"spinquant.{name}")
        (now,) = imports(f"moved.{name}", SOURCE / "moved" / f"{name}.py")
        for public in module.__all__:
            assert getattr(module, public) is getattr(importlib.import_module(f"spinquant.{now}"), public)


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, spinquant; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("name", spinquant.__all__)
def test_public_names_have_docstrings(name: str):
    thing = getattr(spinquant, name)
    if callable(thing):
        assert (thing.__doc__ or "").strip()


def test_hooks_and_registrations_are_where_they_belong():
    for name, path in modules().items():
        text = path.read_text()
        if name not in HOOKS:
            assert "register_forward" not in text, name
        assert "import *" not in text, name


def test_files_that_are_named_exist():
    """A file named in backticks is a neighbour, or its path starts at the package or the repository."""
    root = SOURCE.parents[1]
    named = 0
    for path in (*SOURCE.rglob("*.py"), *(root / "docs").rglob("*.md"), *(root / "benchmarks").glob("*.py")):
        places = (path.parent, SOURCE, SOURCE.parent, root)
        for span in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
            for name in re.findall(r"(?<![\w./-])[\w./-]+\.py\b", span):
                named += 1
                assert any((folder / name).is_file() for folder in places), f"{path}: {name}"
    assert named > 50
