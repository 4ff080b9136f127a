"""Sphinx settings. `make docs` builds site/; every warning is an error."""

import hashlib
import inspect
import os
import re
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.inspect import stringify_signature

ROOT = Path(__file__).parent.parent
_project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "kvattn"
copyright = "the kvattn authors"
release = _project["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_llm.txt"]
exclude_patterns = ["_build"]
default_role = "code"  # single backticks in docstrings are code
nitpicky = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Notebooks are run when the pages are built, and again when a notebook or the package has changed.
_package = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "kvattn").rglob("*.py"))))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / ".cache" / "notebooks" / _package.hexdigest()[:16])
nb_execution_timeout = 600  # of a cell, on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True

# llms.txt, and a Markdown twin of every page.
llms_txt_description = _project["description"]
llms_txt_build_parallel = False  # it then takes the pages as they were read, and runs no notebook again
llms_txt_suffix_mode = "replace"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_math_renderer = "mathml"  # browsers read it, without a script from elsewhere
html_title = f"kvattn {release}"
html_show_sourcelink = False


def _letters_are_no_lists(app, what, name, obj, options, lines):
    """``num_kv_heads: K.`` names an axis; reStructuredText would begin a list A., B., C. there."""
    lines[:] = [re.sub(r"^(\s*(?:\w+: )?)([A-Za-z])\.(?=\s|$)", r"\1\2\\.", line) for line in lines]


def _signature_of_init(app, what, name, obj, options, signature, returns):
    """Flax modules take (*args, **kwargs) by their metaclass; show what __init__ takes."""
    if what != "class" or not (signature or "").startswith("(*args"):
        return None
    taken = list(inspect.signature(obj.__init__).parameters.values())[1:]
    plain = (type(None), bool, int, float, str)
    other = type("Other", (), {"__repr__": lambda self: "..."})()
    taken = [p if p.default is p.empty or isinstance(p.default, plain) else p.replace(default=other) for p in taken]
    return stringify_signature(inspect.Signature(taken), show_annotation=False), None


def _list_variants(app, docname, source):
    """``<!-- every public Policy -->`` becomes the docs of each, so a new variant needs no line here."""
    import kvattn
    from kvattn.codecs.base import Codec
    from kvattn.policies.base import Policy

    for base in (Policy, Codec):
        names = [n for n, x in vars(kvattn).items() if isinstance(x, type) and issubclass(x, base)]
        text = "\n\n".join(f".. autoclass:: kvattn.{name}" for name in names)
        block = f"```{{eval-rst}}\n{text}\n```" if names else "None yet."
        source[0] = source[0].replace(f"<!-- every public {base.__name__} -->", block)


def _as_it_is(translator, node):
    """The star between arguments, which Sphinx marks as an abbreviation, in Markdown."""


def _math(as_block):
    def visit(translator, node):
        translator.body.append(tex2mathml(node.astext(), as_block=as_block))
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", _math(False), _math(True))
    app.add_node(nodes.abbreviation, override=True, **{"llms-markdown": (_as_it_is, _as_it_is)})
    app.connect("source-read", _list_variants)
    app.connect("autodoc-process-docstring", _letters_are_no_lists, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _signature_of_init)
