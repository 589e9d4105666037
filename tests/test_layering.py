"""The plan of the house, enforced: who may import whom, and how large a room may be."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import fxfuse

# Module -> level. A module imports from lower levels only; a new module needs a line here.
LEVELS = {
    level: names.split()
    for level, names in enumerate(
        [
            "errors interrupts page_style progress scene version",
            "files matching moments plain svg",
            "pictures",
            "display graphs",
            "alignment_json checkpoints composition gates modes views",
            "ir naming",
            "aligners correction costs data encoding labels least_squares options page references "
            "solvers tracing values",
            "blocks calls checks contraction decoding evaluation layer_costs sampling",
            "along movement norms passes ties",
            "operators",
            "interpreter",
            "canonical network spaces",
            "folding intake pairing segments sizing statistics widening",
            "adoption alignment inspection neutral producer reshaping",
            "frontier removal rewrites room sockets",
            "balancing merging",
            "correspondence cutting refitting transfer",
            "measuring mixing shortening",
            "coupling emit grafting stands targets weightwise",
            "ascent attaching inplace refit resizing transport",
            "budget fitting parents rescaling weighing",
            "assembly heads layerwise report sweep together",
            "fusion universe weight_matching zipping",
            "barrier demo net2net presets saving terminal",
            "cli",
            "__init__ __main__",
        ]
    )
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}
PACKAGE = Path(fxfuse.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
ARCHITECTURES = [
    *("alexnet", "convnext", "densenet", "efficientnet", "googlenet", "inception", "maxvit"),
    *("mnasnet", "mobilenet", "regnet", "resnet", "resnext", "shufflenet", "squeezenet"),
    *("swin", "vgg", "vit"),
]


def source(module):
    return (PACKAGE / f"{module}.py").read_text()


def imports(module):
    """Names of the modules of this package that a module imports when it runs."""
    tree = ast.parse(source(module))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            named = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.partition(".")[0] for name in named}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert not any(n.partition(".")[0] == "fxfuse" for n in names), "imports are relative"
    return found


def test_every_module_has_a_level():
    assert len(LEVEL) == sum(map(len, LEVELS.values())), "a module has two levels"
    assert not set(MODULES) - set(LEVEL), "give the new modules a level"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_levels_only(module):
    upward = {name for name in imports(module) if LEVEL[name] >= LEVEL[module]}
    assert not upward


def test_imports_are_seen():
    assert {"data", "network", "errors", "tracing"} <= imports("statistics")
    assert imports("errors") == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_longer_than_350_lines(module):
    assert len(source(module).splitlines()) <= 350


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


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for_in_twelve_lines(module):
    text = ast.get_docstring(ast.parse(source(module)))
    assert text and len(text.split("References:")[0].splitlines()) <= 12
