"""Counts what makes a package hard to read: ``python tests/structure.py [--list] [folder]``.

It reads the source and imports nothing of it. `measure` gives the same numbers to a test.
"""

import argparse
import ast
import collections
import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent / "kvattn"

LONG_BODY, LONG_MODULE, MANY_POSITIONAL = 80, 500, 7
BLIND = ("attend", "pallas", "sharding")
"""Sub-packages that should ask an object what it can do, not which class it is."""
FAMILIES = ("Codec", "Policy", "Cache")
"""Base classes of what they should not ask for."""
ARRAYS = {"Array", "AnyArray", "ArrayLike", "ndarray"}
KINDS = {"Float", "Int", "Bool", "UInt", "Num", "Shaped", "Inexact", "Real", "Integer", "Complex", "Key"}
SHAPED = KINDS | {f"{kind}{bits}" for kind in ("Float", "BFloat", "Int", "UInt") for bits in (2, 4, 8, 16, 32, 64)}
"""What jaxtyping writes before an array and its shape."""
ARRAY_LIBRARIES = {"jax", "jax.numpy", "jax.lax", "numpy"}
SHAPE = re.compile(r"\[(\.\.\.|[A-Z0-9*])[^\]\[`\n]*\]|\[\]")
"""A shape in a docstring: ``[B, T, N, H]``, ``[..., H]``."""


@dataclasses.dataclass(frozen=True, order=True)
class Finding:
    """One line of the source that counts."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Module:
    """One file of the package: its dotted name, its path from the package's parent, its text, its syntax tree."""

    name: str
    file: str
    text: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The sub-package, or the module itself where it lies at the top."""
        return ".".join(self.name.split(".")[:2])

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    def found(self, node: ast.AST, text: str) -> Finding:
        return Finding(self.file, getattr(node, "lineno", 1), text)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function, its module, the class it is a method of, and whether it lies within another function."""

    module: Module
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: ast.ClassDef | None
    is_nested: bool

    @property
    def body(self) -> list[ast.stmt]:
        """Its statements, without the docstring."""
        return self.node.body[ast.get_docstring(self.node) is not None :]

    @property
    def num_lines(self) -> int:
        """Of its body."""
        return self.node.end_lineno - self.body[0].lineno + 1 if self.body else 0

    @property
    def parameters(self) -> list[ast.arg]:
        """All but `self` and `cls`."""
        args = self.node.args
        found = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
        return [x for x in found if x is not None and x.arg not in ("self", "cls")]

    @property
    def annotations(self) -> list[ast.expr]:
        """Of its parameters and its result."""
        return [x for x in (*(p.annotation for p in self.parameters), self.node.returns) if x is not None]


def modules_of(folder: pathlib.Path) -> list[Module]:
    """The package's modules, by name."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder.parent)
        parts = inside.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        found.append(Module(name, str(inside), text, ast.parse(text, str(path))))
    return sorted(found, key=lambda module: module.name)


def functions_of(module: Module) -> Iterator[Function]:
    """Every function and method, those within others too."""

    def look(node: ast.AST, owner: ast.ClassDef | None, is_nested: bool) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield Function(module, child, owner, is_nested)
                yield from look(child, None, True)
            else:
                yield from look(child, child if isinstance(child, ast.ClassDef) else owner, is_nested)

    return look(module.tree, None, False)


def docstrings_of(modules: list[Module]) -> Callable[[Function], str]:
    """What documents a function: its docstring, for a constructor its class, for an override what it overrides."""
    classes = {node.name: node for m in modules for node in ast.walk(m.tree) if isinstance(node, ast.ClassDef)}

    def inherited(owner: ast.ClassDef, name: str) -> str:
        names = {_last_name(x) for x in owner.bases} - {owner.name}  # a twin of another library has its name
        for base in (classes[x] for x in sorted(names & classes.keys())):
            own = next((x for x in base.body if isinstance(x, ast.FunctionDef) and x.name == name), None)
            if text := (own and ast.get_docstring(own)) or inherited(base, name):
                return text
        return ""

    def docstring(function: Function) -> str:
        owner, name = function.owner, function.node.name
        if (text := ast.get_docstring(function.node)) or owner is None:
            return text or ""
        return (ast.get_docstring(owner) or "") if name == "__init__" else inherited(owner, name)

    return docstring


# Imports -------------------------------------------------------------------------------------------------------------


def imports_of(module: Module, known: set[str]) -> Iterator[tuple[str, Finding]]:
    """The package's modules that this one imports anywhere, those whose names it holds as strings included."""
    package = module.name.split(".")[0]
    strings = {node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant)}
    data = _arguments(module, "files")  # of `importlib.resources`: these are no imports
    computed = _arguments(module, "import_module")
    for node in ast.walk(module.tree):
        names: Iterable[str] = ()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in data:
            names = [node.value]
        elif isinstance(node, ast.JoinedStr) and node in computed:
            names = _named_by(node, known, strings)
        for name in names:
            if name in known and name not in (module.name, package):
                yield name, module.found(node, f"{module.name} -> {name}")


def _arguments(module: Module, function: str) -> set[ast.AST]:
    """What a module gives to functions of that name."""
    calls = [x for x in ast.walk(module.tree) if isinstance(x, ast.Call) and _last_name(x.func) == function]
    return {argument for call in calls for argument in call.args}


def _named_by(node: ast.JoinedStr, known: set[str], strings: set[object]) -> list[str]:
    """Modules that an f-string may name: with a string of the same file in its hole, or with any if none fits."""
    pattern = "".join(re.escape(x.value) if isinstance(x, ast.Constant) else r"(\w+)" for x in node.values)
    matches = [match for name in sorted(known) if (match := re.fullmatch(pattern, name))]
    exact = [match for match in matches if all(hole in strings for hole in match.groups())]
    return [match.group() for match in exact or matches]


def cycles(edges: dict[str, dict[str, Finding]]) -> list[list[str]]:
    """Sets of nodes that reach each other, of two or more."""
    reached = {node: _reached_from(node, edges) for node in edges}
    groups = {frozenset({a, *(b for b in reached[a] if a in reached.get(b, ()))}) for a in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached_from(start: str, edges: dict[str, dict[str, Finding]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = set(edges.get(todo.pop(), ())) - seen
        seen |= new
        todo += new
    return seen


def import_cycles(modules: list[Module]) -> tuple[list[list[Finding]], list[list[Finding]]]:
    """The imports of every cycle between sub-packages, and of every cycle between modules."""
    known = {module.name for module in modules}
    parts: dict[str, dict[str, Finding]] = collections.defaultdict(dict)
    single: dict[str, dict[str, Finding]] = collections.defaultdict(dict)
    for module in modules:
        for name, finding in imports_of(module, known):
            single[module.name].setdefault(name, finding)
            part = ".".join(name.split(".")[:2])
            if part != module.part and module.name != module.name.split(".")[0]:
                parts[module.part].setdefault(part, finding)

    def inside(edges: dict[str, dict[str, Finding]]) -> list[list[Finding]]:
        return [
            sorted({edges[a][b] for a in group for b in edges[a] if b in group})  #
            for group in cycles(edges)
        ]

    return inside(parts), inside(single)


# Classes that are asked for ------------------------------------------------------------------------------------------


def family_classes(modules: list[Module]) -> set[str]:
    """Names of the classes of `FAMILIES`."""
    bases = {
        node.name: {_last_name(base) for base in node.bases}
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    found = set(FAMILIES)
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found


def class_tests(module: Module, classes: set[str]) -> Iterator[Finding]:
    """Where code asks which codec, policy or cache it has, but not to refuse it."""
    named = lambda node: any(_last_name(x) in classes for x in ast.walk(node))
    for node in module.tree.body:  # names of several classes together
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.BinOp) and named(node.value):
            classes = classes | {_last_name(target) for target in node.targets}

    def asked(node: ast.AST) -> bool:
        if isinstance(node, ast.MatchClass):
            return named(node.cls)
        if not isinstance(node, ast.Call):
            return False
        name = _last_name(node.func)
        if name in ("isinstance", "issubclass"):
            return named(node.args[1])
        return name == "type" and len(node.args) == 1 and named(statement_of[node])

    statement_of: dict[ast.AST, ast.AST] = {}
    refusals: set[ast.AST] = set()
    for statement in ast.walk(module.tree):
        if isinstance(statement, ast.stmt):
            for child in _own_expressions(statement):
                statement_of[child] = statement
        if isinstance(statement, ast.If) and any(isinstance(x, ast.Raise) for x in statement.body):
            refusals |= set(ast.walk(statement.test))
    for node in ast.walk(module.tree):
        if node not in refusals and asked(node):
            yield module.found(node, ast.unparse(node))


def _own_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """What a statement holds but for the statements in it."""
    todo: list[ast.AST] = [statement]
    while todo:
        children = [x for x in ast.iter_child_nodes(todo.pop()) if not isinstance(x, ast.stmt)]
        yield from children
        todo += children


def _last_name(node: ast.AST) -> str:
    """`x` of `x`, `a.x` and `x[...]`; "" of anything else."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# Signatures ----------------------------------------------------------------------------------------------------------


def annotations_of(module: Module) -> Iterator[ast.expr]:
    """Every annotation: of parameters, results, fields and variables."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns


def shaped_names(modules: list[Module]) -> set[str]:
    """`SHAPED`, and names of the package that stand for one of them with its letters."""
    return SHAPED | {
        _last_name(node.targets[0])
        for module in modules
        for node in module.tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Subscript)
        and _last_name(node.value) in SHAPED
        and ARRAYS & {_last_name(x) for x in ast.walk(node.value)}
    }


def lacks_shapes(function: Function, docstring: str, shaped: set[str], has_arrays: bool) -> bool:
    """Whether a function takes or returns arrays and says their shapes nowhere.

    Args:
        function: which.
        docstring: what documents it.
        shaped: names that give a shape.
        has_arrays: whether its module computes with arrays: there, a parameter without annotation is one.
    """
    bare = any(_has_bare_array(annotation, shaped) for annotation in function.annotations)
    unknown = has_arrays and any(parameter.annotation is None for parameter in function.parameters)
    return (bare or unknown) and not SHAPE.search(docstring)


def _has_bare_array(annotation: ast.AST, shaped: set[str]) -> bool:
    """Whether an array is named outside of ``Float[Array, "B T N H"]`` and its like."""
    if _last_name(annotation) in shaped:
        return False
    if isinstance(annotation, ast.Name | ast.Attribute) and _last_name(annotation) in ARRAYS:
        return True
    return any(_has_bare_array(child, shaped) for child in ast.iter_child_nodes(annotation))


def imports_arrays(module: Module) -> bool:
    """Whether a module computes with arrays."""
    return any(
        isinstance(node, ast.Import) and any(alias.name in ARRAY_LIBRARIES for alias in node.names)
        for node in ast.walk(module.tree)
    )


# All together --------------------------------------------------------------------------------------------------------


def measure(folder: pathlib.Path = ROOT) -> dict[str, list[Finding]]:
    """What counts, by name, and where it is."""
    modules = modules_of(folder)
    functions = [function for module in modules for function in functions_of(module)]
    classes, shaped = family_classes(modules), shaped_names(modules)
    with_arrays = {module.name for module in modules if imports_arrays(module)}
    docstring = docstrings_of(modules)
    of_packages, of_modules = import_cycles(modules)
    cycle = lambda group: dataclasses.replace(group[0], text=", ".join(x.text for x in group))
    found: dict[str, list[Finding]] = {
        "import cycles between sub-packages": [cycle(group) for group in of_packages],
        "import cycles between modules": [cycle(group) for group in of_modules],
        "class tests in " + ", ".join(BLIND): [
            x for module in modules if module.part.split(".")[-1] in BLIND for x in class_tests(module, classes)
        ],
        f"calls with more than {MANY_POSITIONAL} positional arguments": [
            module.found(node, f"{ast.unparse(node.func)}(...), {len(node.args)}")
            for module in modules
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call) and len(node.args) > MANY_POSITIONAL
        ],
        "annotations that are Any": [
            module.found(x, "Any") for module in modules for x in annotations_of(module) if _last_name(x) == "Any"
        ],
        "lines with Any": [
            Finding(module.file, i, line.strip())
            for module in modules
            for i, line in enumerate(module.text.splitlines(), 1)
            if re.search(r"\bAny\b", line) and not re.match(r"\s*from typing import", line)
        ],
    }
    for title, is_nested in (("functions over arrays without shapes", False), ("the same, within functions", True)):
        found[title] = [
            f.module.found(f.node, f.node.name)
            for f in functions
            if f.is_nested == is_nested and lacks_shapes(f, docstring(f), shaped, f.module.name in with_arrays)
        ]
    found[f"bodies over {LONG_BODY} lines"] = [
        f.module.found(f.node, f"{f.node.name}, {f.num_lines}") for f in functions if f.num_lines > LONG_BODY
    ]
    found[f"modules over {LONG_MODULE} lines"] = [
        module.found(module.tree, f"{module.num_lines} lines") for module in modules if module.num_lines > LONG_MODULE
    ]
    return {name: sorted(places) for name, places in found.items()}


def sizes(folder: pathlib.Path = ROOT) -> dict[str, int]:
    """Modules, functions and lines."""
    modules = modules_of(folder)
    return {
        "modules": len(modules),
        "functions": sum(1 for module in modules for _ in functions_of(module)),
        "lines": sum(module.num_lines for module in modules),
    }


def main(arguments: list[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=ROOT, help="the package")
    parser.add_argument("--list", action="store_true", help="show where")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    for name, places in measure(folder).items():
        print(f"{len(places):6}  {name}")
        if options.list:
            print(*(f"          {place}" for place in places), sep="\n")
    for name, count in sizes(folder).items():
        print(f"{count:6}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
