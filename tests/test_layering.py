"""The plan of the house, enforced: who may import whom, and how large a room may be."""

import ast
import io
import re
import tokenize
from pathlib import Path

import networkx as nx
import pytest

import fxfuse
from fxfuse.spaces.operators import OPERATORS

# Package, or module at the top -> level. A package imports from lower levels only; those of one
# level know nothing of each other.
LEVELS = {
    name: level
    for level, names in enumerate(
        [
            "errors version",
            "ir solvers _checked _files _progress _ranks _schema",
            "graph",
            "spaces report",
            "calibration io",
            "alignment",
            "depth",
            "coupling",
            "width refit mixers",
            "fusion",
            "presets",
            "cli",
            "__init__ __main__",
        ]
    )
    for name in names.split()
}
# What only hands over to what draws, writes or is named, imported no earlier than it is called.
VIEWS = {"ir": {"report.graphs", "report.alignment_picture", "report.plots", "io.alignment_file"}}
VIEWS["report.report"] = {"report.plots", "report.html", "report.alignment_picture"}
VIEWS["fusion.fuse"] = {"presets"}  # by name
PACKAGE = Path(fxfuse.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)
# The table of operators, the rules in it, and the functions that a file may name.
RULES = {"spaces._rules", "spaces._along", "spaces._indexing", "spaces._products"}
NAMING_OPERATORS = {"spaces.operators", "io._allowlist"} | RULES
ARCHITECTURES = [
    *("alexnet", "convnext", "densenet", "efficientnet", "googlenet", "inception", "maxvit"),
    *("mnasnet", "mobilenet", "regnet", "resnet", "resnext", "shufflenet", "squeezenet"),
    *("swin", "vgg", "vit"),
]


def source(module):
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text()


def imports(module):
    """Modules of this package that a module imports, wherever it says so."""
    found = set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                found.add(_module([*base, alias.name]) or _module(base) or ".".join(base))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert not any(n.partition(".")[0] == "fxfuse" for n in names), "imports are relative"
    return found


def _module(parts):
    """The module of a path, or that of a package itself; None if it is neither."""
    name = ".".join(parts)
    if name in MODULES:
        return name
    return f"{name}.__init__" if f"{name}.__init__" in MODULES else None


def level(module):
    return LEVELS[module.partition(".")[0]]


def test_every_room_has_a_level():
    rooms = {m.partition(".")[0] for m in MODULES}
    assert rooms == set(LEVELS), "a new room needs a level, and one that is gone needs none"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_levels_or_its_own_package_only(module):
    room = module.partition(".")[0]
    for other in imports(module) - VIEWS.get(module, set()):
        own = other.partition(".")[0] == room
        assert own or level(other) < level(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_private_module_of_another_package(module):
    package = module.rpartition(".")[0]
    for other in imports(module):
        room, _, name = other.rpartition(".")
        assert not (room and name.startswith("_") and name != "__init__") or room == package


def test_top_level_facts_know_each_other_in_one_direction():
    assert imports("errors") == set() and imports("ir") <= {"errors", *VIEWS["ir"]}


def test_there_is_no_circle_of_imports():
    graph = nx.DiGraph((m, other) for m in MODULES for other in imports(m) - VIEWS.get(m, set()))
    assert list(nx.simple_cycles(graph)) == []


def test_imports_are_seen():
    assert {"calibration.data", "spaces.network", "errors"} <= imports("calibration.run")
    assert "report.html" in imports("report.report"), "those inside functions, too"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long(module):
    assert len(source(module).splitlines()) <= 600


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_60_lines(module):
    long = [
        f"{node.name}: {_lines(node)}"
        for node in ast.walk(ast.parse(source(module)))
        if isinstance(node, ast.FunctionDef) and _lines(node) > 60
    ]
    assert not long


def _lines(function):
    """Lines of the body without the docstring, and of the head."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
        lines -= first.end_lineno - first.lineno + 1
    return lines


def code(module):
    """The source without comments and docstrings."""
    text, docstrings = source(module), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    kept = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type != tokenize.COMMENT and token.start[0] not in docstrings
    ]
    return " ".join(kept).lower()


def named(text):
    return re.findall(rf"(?<![a-z])(?:{'|'.join(ARCHITECTURES)})(?![a-z])", text)


@pytest.mark.parametrize("module", MODULES)
def test_no_architecture_is_named_in_code(module):
    assert not named(code(module))


def test_names_of_architectures_would_be_seen():
    assert named("if resnet18:") and named("isinstance(m, torchvision.models.vit_b_16)")
    assert not named("invite the vital swing")


def operators_asked_for(text):
    """Names of ATen operators that code compares something with, or looks something up in."""
    parts = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            parts += [node.left, *node.comparators]
        elif isinstance(node, ast.Set):
            parts += node.elts
    constants = [n.value for p in parts for n in ast.walk(p) if isinstance(n, ast.Constant)]
    return {c for c in constants if c in OPERATORS} - {"zeros"}  # a way to pad, too


@pytest.mark.parametrize("module", sorted({*MODULES} - NAMING_OPERATORS))
def test_operators_are_known_in_one_place_and_asked_by_property_elsewhere(module):
    assert not operators_asked_for(source(module))


def test_comparisons_with_names_of_operators_would_be_seen():
    assert operators_asked_for("if step.name == 'add': pass") == {"add"}
    assert operators_asked_for("{s.name for s in steps} <= {'cat', 'stack'}") == {"cat", "stack"}
    assert operators_asked_for("names & {*('mul', 'other')}") == {"mul"}
    assert not operators_asked_for("graph.call_method('transpose', args)")


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for_in_twelve_lines(module):
    text = ast.get_docstring(ast.parse(source(module)))
    assert text and len(text.split("References:")[0].splitlines()) <= 12


def test_no_test_imports_from_another_test():
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                assert node.module.startswith("tests.support."), path


def test_tests_mirror_the_packages():
    own = {"devices", "fuzz", "graphs", "layering", "public_api", "torchvision", "transformers"}
    own |= {"zoo"}
    homes = {m.replace("._", ".").removeprefix("_") for m in MODULES}
    for path in TESTS.rglob("test_*.py"):
        folder = path.relative_to(TESTS).parent.parts
        name = ".".join([*folder, path.stem.removeprefix("test_")])
        assert name in homes | own or folder in (("examples",), ("docs",)), (
            f"{path} tests no module"
        )
