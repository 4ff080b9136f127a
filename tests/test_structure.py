"""What `tests/structure.py` counts, on a package of a few lines, and the picture that is drawn from the code."""

import ast
import importlib.util
import pathlib
import shutil
import subprocess
import sys

import pytest
import structure

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.py"


@pytest.fixture
def counted(tmp_path):
    """Counts a package that has these files; gives what is found under a part of a name."""

    def count(name, **files):
        folder = tmp_path / "toy"
        shutil.rmtree(folder, ignore_errors=True)
        for file, text in {"__init__": "", **files}.items():
            path = folder / f"{file.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        (found,) = [places for title, places in structure.measure(folder).items() if name in title]
        return [place.text for place in found]

    return count


IMPORTS = {
    "written out": "from toy.b.two import x",
    "of a name": "from toy.b import two",
    "within a function": "def f():\n    import toy.b.two",
    "by a string": 'MODULES = {"two": "toy.b.two"}',
    "by a string that is put together": 'import importlib\nNAME = "two"\nimportlib.import_module(f"toy.b.{NAME}")',
}


@pytest.mark.parametrize("how", IMPORTS)
@pytest.mark.parametrize("between", ["sub-packages", "modules"])
def test_cycles(counted, how, between):
    files = {"a__in__one": IMPORTS[how], "b__in__two": "from toy.a import one"}
    assert len(counted(f"cycles between {between}", **files)) == 1
    assert counted(f"cycles between {between}", **files | {"b__in__two": "x = 1"}) == []


def test_what_is_no_import_makes_no_cycle(counted):
    one = 'import importlib.resources\nimportlib.resources.files("toy.b.two")\nx = f"toy.b.{1}"\n"""See toy.b.two."""'
    assert counted("between modules", a__in__one=one, b__in__two="from toy.a import one") == []


CLASSES = "class Codec: pass\nclass Int4(Codec): pass\nclass Other: pass\n"
TESTS = {
    "isinstance(x, Int4)": 1,
    "isinstance(x, Other | codecs.Int4)": 1,
    "isinstance(x, (int, Int4))": 1,
    "isinstance(x, SOME)": 1,
    "type(x) is Int4": 1,
    "{Int4: 1}.get(type(x))": 1,
    "isinstance(x, Other)": 0,
    "type(x) is Other": 0,
    "isinstance(x, int)": 0,
}


@pytest.mark.parametrize("test", TESTS)
def test_class_tests(counted, test):
    text = f"SOME = (Int4, Other)\ndef f(x):\n    if {test}:\n        return 1\n"
    assert len(counted("class tests", codecs=CLASSES, attend=text)) == TESTS[test]
    assert counted("class tests", codecs=CLASSES, cache=text) == []  # may know them
    refusal = text.replace("return 1", "raise ValueError(x)")
    assert counted("class tests", codecs=CLASSES, attend=refusal) == []


def test_a_pattern_is_a_class_test(counted):
    text = "def f(x):\n    match x:\n        case Int4():\n            pass\n        case Other():\n            pass\n"
    assert len(counted("class tests", codecs=CLASSES, attend=text)) == 1


def test_positional_arguments(counted):
    assert counted("positional", a="f(1, 2, 3, 4, 5, 6, 7)\nf(1, 2, 3, 4, 5, 6, 7, x=8)") == []
    assert counted("positional", a="f(1, 2, 3, 4, 5, 6, *x, 8)") == ["f(...), 8"]


def test_any(counted):
    text = "def f(a: Any, *b: Any, c: list[Any] = 0) -> Any:\n    x: Any = 1\n    y: int = 2\n"
    assert len(counted("that are Any", a=text)) == 4
    assert len(counted("lines with Any", a="from typing import Any\n" + text)) == 2


SHAPES = {
    "def f(x: Array): pass": 1,
    "def f() -> jax.Array: pass": 1,
    "def f(x: dict[str, Array] | None): pass": 1,
    "def f(x): pass": 1,
    'def f(x: Array):\n    """Takes x."""': 1,
    'def f(x: Array):\n    """Takes [B, T]."""': 0,
    'def f(x):\n    """Of [..., H]."""': 0,
    'def f(x: Float[Array, "B T"]) -> Keys | None: pass': 0,
    'def f(x: Float[Array, "B T"]) -> Array: pass': 1,
    'def f(x: Int32[Array, "B T"], y: UInt8[Array, ""] | None) -> BFloat16[Array, "*"]: pass': 0,
    "def f(x: int) -> str: pass": 0,
    "def f(self): pass": 0,
    'class A:\n    def g(self, x: Array):\n        """[B]"""\nclass B(A):\n    def g(self, x: Array): pass': 0,
    'class A:\n    """[B]"""\n    def __init__(self, x: Array): pass': 0,
}


@pytest.mark.parametrize("text", SHAPES)
def test_shapes(counted, text):
    assert len(counted("without shapes", a=f'import jax\nKeys = Float[Array, "B S"]\n{text}\n')) == SHAPES[text]


def test_functions_in_functions_are_told_apart(counted):
    text = "import jax\ndef outer():\n    def f(x): pass\n"
    assert (counted("without shapes", a=text), counted("the same, within", a=text)) == ([], ["f"])


def test_long_bodies_and_modules(counted):
    body = "    x = 1\n" * 80
    assert counted("bodies", a=f'def f(a,\n      b):\n    """Doc.\n\n    More.\n    """\n{body}') == []
    assert counted("bodies", a=f"def f():\n    x = 1\n{body}") == ["f, 81"]
    assert counted("modules over", a="\n" * 500) == [] and counted("modules over", a="\n" * 501) == ["501 lines"]


def test_the_command(capsys):
    structure.main(["--list"])
    out = capsys.readouterr().out
    assert "calls with more than 7" in out and "kvattn/" in out and out.split()[-1] == "lines"


def drawing():
    spec = importlib.util.spec_from_file_location("architecture", PICTURE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_the_code_says():
    done = subprocess.run([sys.executable, PICTURE, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_picture_shows_imports_that_point_the_wrong_way(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "kvattn"
    for name, text in {"__init__": "", "layers": '"""Layers. More."""\nimport kvattn.masks', "masks": ""}.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
    module = drawing()
    right = module.drawing(folder)
    assert "<title>layers imports masks</title>" in right and 'class="wrong"' not in right
    assert ">Layers<" in right and "More" not in right and module.drawing(folder) == right
    (folder / "masks.py").write_text("import kvattn.layers")
    assert 'class="wrong"' in module.drawing(folder)
    monkeypatch.setattr(module, "TARGET", tmp_path / "architecture.svg")
    assert module.main(["--check"]) == 1 and "is not what the code says" in capsys.readouterr().out
    assert module.main([]) == 0 == module.main(["--check"])


def test_protocols_can_be_checked_at_run_time():
    """`--shapes` checks arguments against them when a module is imported; one that cannot be checked stops it."""
    found = {}
    for path in (ROOT / "kvattn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
                found[node.name] = [ast.unparse(decorator) for decorator in node.decorator_list]
    assert (
        len(found) >= 7 and [name for name, decorators in found.items() if "runtime_checkable" not in decorators] == []
    )
