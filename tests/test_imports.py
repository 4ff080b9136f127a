"""Imports point one way, and `import kvattn` is light.

The contracts are in pyproject.toml and checked by import-linter. Each is also shown to fail: a toy
package with one wrong import, judged by the same contracts, must be rejected.
"""

import ast
import importlib
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvattn"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]

# Each line reads: this file importing that breaks a contract, and this word is in the complaint.
WRONG_IMPORTS = [
    ("errors.py", "from kvattn import _typing", "kvattn._typing"),
    ("masks.py", "from kvattn import cache", "kvattn.cache"),
    ("policies/h2o.py", "from kvattn.cache import kv_cache", "kvattn.cache"),
    ("policies/h2o.py", "from kvattn.codecs import int8", "kvattn.codecs"),
    ("families/hf/llama.py", "from kvattn import memory", "kvattn.memory"),
    ("codecs/int8.py", "from kvattn.policies import h2o", "kvattn.policies"),
    ("cache/kv_cache.py", "def late():\n    from kvattn.attend import xla", "kvattn.attend"),
    ("cache/kv_cache.py", "from kvattn import pallas", "kvattn.pallas"),
    ("attend/xla.py", "from kvattn import layers", "kvattn.layers"),
    ("sharding/heads.py", "from kvattn import models", "kvattn.models"),
    ("serving/radix.py", "from kvattn import cli", "kvattn.cli"),
    ("serving/radix.py", "import jax", "jax"),
    ("serving/blocks.py", "def late():\n    from jax import numpy", "jax"),
    ("novelty.py", "", "kvattn.novelty"),
    ("masks.py", "import flax", "flax"),
    ("cache/kv_cache.py", "def late():\n    from flax import nnx", "flax"),
]

RIGHT_IMPORTS = [
    ("layers/attention.py", "from flax import nnx"),
    ("models/decoder.py", "from flax import nnx\nfrom kvattn import layers"),
    ("attend/step.py", "from kvattn import cache, policies, codecs, masks, errors"),
    ("cli.py", "from kvattn import serving, memory"),
]


def run_python(code, cwd=ROOT):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def lint(folder):
    pytest.importorskip("importlinter", reason="import-linter is in the test group of pyproject.toml")
    code = (
        "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(no_cache=True))"
    )
    return run_python(code, folder)


def toy_package(folder, file, code):
    """A package with kvattn's folders and nothing in them, but `code` in `file`; and kvattn's contracts."""
    names = ["_typing", "cache", "cli", "codecs", "errors", "layers", "masks", "models", "pallas", "policies"]
    names += ["attend", "families", "positions", "serving", "sharding", "memory"]
    files = [
        f"{n}.py" if n in ("_typing", "cli", "errors", "masks", "positions", "memory") else f"{n}/__init__.py"
        for n in names
    ]
    files += ["__init__.py", "policies/h2o.py", "codecs/int8.py", "cache/kv_cache.py", "attend/xla.py"]
    files += ["families/hf/__init__.py"]
    for name in files:
        path = folder / "kvattn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (folder / "kvattn" / file).write_text(code + "\n")
    text = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(text[text.index("[tool.importlinter]") :])


def test_imports_point_one_way():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(("file", "code", "word"), WRONG_IMPORTS)
def test_a_wrong_import_is_rejected(tmp_path, file, code, word):
    toy_package(tmp_path, file, code)
    result = lint(tmp_path)
    assert result.returncode != 0
    assert "BROKEN" in result.stdout, result.stdout + result.stderr
    assert word in result.stdout


@pytest.mark.parametrize(("file", "code"), RIGHT_IMPORTS)
def test_a_right_import_is_accepted(tmp_path, file, code):
    toy_package(tmp_path, file, code)
    result = lint(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_of_the_package_is_judged():
    """The linter sees what is on disk: a folder without __init__.py would escape it."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_package_never_imports_itself_as_a_whole():
    """`import kvattn; kvattn.layers...` inside the package would pass by the contracts."""
    guilty = [str(path) for path in PACKAGE.rglob("*.py") if "kvattn" in imported_names(path)]
    assert not guilty


def test_host_side_serving_needs_no_jax():
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("kvattn", include_external_packages=True, cache_dir=None)
    modules = ("blocks", "groups", "radix", "replay", "trace", "scheduler", "agreement", "digests", "ledger", "lending")
    modules += ("disk", "encoding", "files", "kinds", "records", "stack", "tiers", "workers")
    names = [name for name in modules if (PACKAGE / "serving" / f"{name}.py").exists()]
    for name in names:
        chain = graph.find_shortest_chain(f"kvattn.serving.{name}", "jax")
        assert chain is None, " -> ".join(chain)


def test_examples_and_benchmarks_use_public_names_only():
    for path in [*ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        ours = [name for name in imported_names(path) if name.split(".")[0] == "kvattn"]
        assert not [name for name in ours if any(part.startswith("_") for part in name.split("."))], path


def test_import_kvattn_is_light():
    code = "import sys, kvattn; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split()
    assert "jax" in loaded
    assert "kvattn" in loaded
    assert not {"flax", "optax", "orbax", "safetensors", "tokenizers", "typer", "matplotlib"} & set(loaded)


def test_submodules_load_on_first_use():
    code = """
import sys, kvattn
print("flax" in sys.modules)
kvattn.layers.MultiHeadAttention
print("flax" in sys.modules)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False", "True"]


NAMES = ("layers", "memory", "models", "pallas", "serving", "sharding")
PUBLIC = [name for name in NAMES if (PACKAGE / name / "__init__.py").exists()]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_submodules_are_attributes(name):
    result = run_python(f"import kvattn; print(kvattn.{name}.__name__); assert '{name}' in dir(kvattn)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"kvattn.{name}"


DOTTED = (
    *("cache.KVCache", "codecs.Int8", "errors.KVAttnError", "policies.H2O", "positions.RoPE", "memory.plan"),
    *("layers.MultiHeadAttention", "layers.linen.MultiHeadDotProductAttention", "layers.linen.SelfAttention"),
    *("pallas.decode_attention", "pallas.compat.mqa", "pallas.tuning", "sharding.choose", "models.from_pretrained"),
    *("models.DecoderConfig", "models.convert_to_gqa", "generate", "serving.BlockPool", "serving.replay"),
)


def test_whatever_is_public_is_there_after_import_kvattn():
    result = run_python("import kvattn\n" + "\n".join(f"kvattn.{name}" for name in DOTTED))
    assert result.returncode == 0, result.stderr


def test_a_star_import_brings_all_there_is_and_naming_it_brings_nothing():
    code = """
import sys, kvattn
names = kvattn.__all__
assert "flax" not in sys.modules and set(names) <= set(dir(kvattn))
from kvattn import *
assert all(globals()[name] is getattr(kvattn, name) for name in names)
assert generate is models.generate and layers.linen.SelfAttention
print(*names)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    names = result.stdout.split()
    assert len(names) == len(set(names))
    assert {name.split(".")[0] for name in DOTTED} <= set(names)
    assert set(exported(PACKAGE / "__init__.py")) == set(names)


def exported(path):
    """What the code of a package makes public: all it defines, and of kvattn's all that it imports."""
    imports_of_types = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            imports_of_types = node.body
    for node in [*ast.parse(path.read_text()).body, *imports_of_types]:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "kvattn":
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


PACKAGES = (
    "adapters", "attend", "cache", "codecs", "families", "layers", "memory", "models", "pallas", "policies",
    "positions", "serving", "sharding", "testing",
)  # fmt: skip


@pytest.mark.parametrize("name", [*PACKAGES, "errors", "layers.linen", "pallas.compat"])
def test_all_of_a_package_is_in_its_list(name):
    module = importlib.import_module(f"kvattn.{name}")
    assert len(module.__all__) == len(set(module.__all__))
    assert [n for n in module.__all__ if not hasattr(module, n)] == []
    assert set(module.__all__) <= set(dir(module))
    if name in PACKAGES or name == "errors":
        path = PACKAGE / (f"{name}.py" if name == "errors" else f"{name}/__init__.py")
        assert set(module.__all__) == set(exported(path))


def test_every_package_has_a_list():
    public = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cli"}
    assert public == set(PACKAGES)


def test_an_unknown_name_is_an_attribute_error():
    result = run_python("import kvattn; kvattn.no_such_thing")
    assert "AttributeError" in result.stderr
    assert "no_such_thing" in result.stderr


def test_the_core_runs_where_no_flax_is_installed():
    code = """
import sys
class NoFlax:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flax":
            raise ModuleNotFoundError("No module named 'flax'", name="flax")
sys.meta_path.insert(0, NoFlax())
import jax.numpy as jnp, kvattn
cache = kvattn.KVCache.create(1, 2, 8, capacity=4, dtype=jnp.float32)
out, cache = kvattn.cached_attention(jnp.ones((1, 1, 4, 8)), jnp.ones((1, 1, 2, 8)), jnp.ones((1, 1, 2, 8)), cache)
print(int(cache.lengths[0]))
try:
    kvattn.layers
except ModuleNotFoundError as error:
    print(error.name)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1", "flax"]


def unknown_slow_tests(lines, collected):
    """The lines of slow.txt that name no test: of the files that were collected by node id, else by function."""
    files = {nodeid.split("::")[0] for nodeid in collected}
    for line in lines:
        file, function = line.split("[")[0].split("::")
        if line not in collected if file in files else f"def {function}(" not in (ROOT / file).read_text():
            yield line


def test_slow_tests_are_there(collected):
    """What slow.txt names exists: a test that was renamed, or its parameters, would be quick again unnoticed."""
    lines = [line for line in (ROOT / "tests" / "slow.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(set(lines))
    assert not list(unknown_slow_tests(lines, collected))
    # And it can fail: another function, other parameters of a file that was collected.
    file = "tests/test_imports.py"
    wrong = [f"{file}::no_such_test", f"{file}::test_a_wrong_import_is_rejected[no such parameter]"]
    assert list(unknown_slow_tests(wrong, {f"{file}::{name}" for name in ("a", "b[c]")})) == wrong
    assert list(unknown_slow_tests(wrong, ())) == wrong[:1]
