"""A wheel is all that a user needs: installed into an empty environment it runs the README's example."""

import os
import pathlib
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from test_docs import blocks

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*words, cwd):
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, env=own | {"JAX_PLATFORMS": "cpu"}, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_wheel_in_an_empty_environment_runs_the_readme(tmp_path):
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("kvattn-*.whl")
    assert wheel.name == f"kvattn-{PROJECT['version']}-py3-none-any.whl"
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "kvattn").rglob("*.py")} | {"kvattn/py.typed"}
    assert package <= set(zipfile.ZipFile(wheel).namelist())

    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, *pip, "install", wheel, cwd=tmp_path)
    ((_, example),) = blocks((ROOT / "README.md").read_text())
    where = "\nimport pathlib; assert 'empty' in pathlib.Path(kvattn.__file__).parts, kvattn.__file__\n"
    (tmp_path / "example.py").write_text(example + where + "print(kvattn.__version__)\n")
    assert run(python, "example.py", cwd=tmp_path).split()[-1] == PROJECT["version"]
