"""The documentation agrees with the code: every command, option, public name and link.

`python tests/laws/test_documentation.py` regenerates docs/reference/cli.md.
"""

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import spinquant
import spinquant.cli
from spinquant.cli.main import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COMMAND_LINE = DOCS / "reference" / "cli.md"
HEAD = """# Command line

The help of every command, as `spinquant COMMAND --help` prints it. `python tests/laws/test_documentation.py` writes
this page, and a test compares it with the code.
"""
# A whole line of a page that names a public object for mkdocstrings.
DIRECTIVE = re.compile(r"^::: spinquant\.(\w+)$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FRONT_PAGE = {"load", "rotate", "quantize", "save", "learn", "evaluate", "rotate_folder", "quantize_folder"}
FRONT_PAGE |= {"RotationSpec", "parse_scheme", "Scheme", "Calibration", "SpinQuantModifier"}


def commands() -> dict[str, Any]:
    """The click command of every command, by name."""
    for module in pkgutil.iter_modules(spinquant.cli.__path__):
        if module.name != "__main__":
            importlib.import_module(f"spinquant.cli.{module.name}")
    group: Any = get_command(app)
    context = group.make_context("spinquant", ["rotate"], resilient_parsing=True)
    return {name: group.get_command(context, name) for name in sorted(group.list_commands(context))}


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def name_of(argument: Any) -> str:
    return argument.name.strip("_").upper()


def default_of(option: Any) -> str:
    value = option.default
    if (
        not option.show_default
        or value is None
        or option.is_flag
        or callable(value)
        or str(value) == ""
        or "UNSET" in repr(value)
    ):
        return ""
    return f" Default: `{value}`."


def help_page() -> str:
    """docs/reference/cli.md, from the parameters of the commands."""
    parts = [HEAD]
    for name, command in commands().items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
        usage = " ".join((name_of(p) if p.required else f"[{name_of(p)}]") for p in arguments)
        parts.append(f"## spinquant {name}\n\n    spinquant {name} {usage} [OPTIONS]\n")
        parts.append(re.sub(r"[\f\b]", "", command.help or "").strip() + "\n")
        if command.epilog:
            parts.append(command.epilog.strip() + "\n")
        panels: dict[str, list[str]] = {}
        for p in arguments:
            panels.setdefault("Arguments", []).append(f"| `{name_of(p)}` | {cell(p.help or '')} |")
        for p in options:
            names = ", ".join(f"`{one}`" for one in [*p.opts, *p.secondary_opts])
            panel = getattr(p, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(f"| {names} | {cell((p.help or '') + default_of(p))} |")
        for panel, rows in panels.items():
            parts.append(f"| {panel} | |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def test_the_cli_reference_equals_the_help_of_the_commands():
    assert COMMAND_LINE.read_text(encoding="utf-8") == help_page(), f"run python {Path(__file__).relative_to(ROOT)}"


def test_every_public_name_is_in_the_reference_once():
    front = DIRECTIVE.findall((DOCS / "reference" / "api.md").read_text(encoding="utf-8"))
    advanced = DIRECTIVE.findall((DOCS / "reference" / "api-advanced.md").read_text(encoding="utf-8"))
    assert set(front) == FRONT_PAGE
    assert sorted(front + advanced) == sorted(set(spinquant.__all__) - {"__version__"})


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_in_the_repositorys_pages_resolve(page: str):
    """`make docs` checks the links between pages of docs/."""
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        assert path.startswith("http") or (ROOT / path).exists(), f"{page}: {target}"


def test_paths_that_the_documentation_names_exist():
    """In backticks: `rotations/fuse.py` within src/spinquant, or a path from the root of the repository."""
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for name in re.findall(r"`([\w/-]+/[\w/.-]+\.(?:py|md|toml))`", page.read_text(encoding="utf-8")):
            places = (ROOT / name, ROOT / "src" / "spinquant" / name)
            assert any(place.exists() for place in places), f"{page.relative_to(ROOT)}: {name}"


def test_the_design_page_describes_the_code_as_it_is():
    """Its list of packages is the order of imports, and every file and name in backticks exists."""
    page = (DOCS / "explanation" / "design.md").read_text(encoding="utf-8")
    listed = re.findall(r"^    (\w+)(?:/|\.py) ", page, re.MULTILINE)
    tree = ast.parse((ROOT / "tests" / "test_layout.py").read_text(encoding="utf-8"))
    (order,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
    ]
    assert listed == [name for name in order if name != "__main__"]
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    files = {path.name for path in sources}
    words = {word for path in sources for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    for code in re.findall(r"`([^`]+)`", page):
        if code.endswith(".py"):
            assert "/" in code or code in files, code  # paths are checked above
        elif code.endswith("/"):
            assert (ROOT / code).is_dir() or (ROOT / "src" / "spinquant" / code).is_dir() or code == "spinquant/", code
        elif "/" not in code:
            assert set(re.findall(r"[A-Za-z_]\w*", code)) <= words, code


def test_pages_that_the_code_names_exist():
    """Errors, help and docstrings send their readers to pages of docs/."""
    for folder in ("src", "tests", "benchmarks", "examples", "clients"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"


if __name__ == "__main__":
    COMMAND_LINE.write_text(help_page(), encoding="utf-8")
