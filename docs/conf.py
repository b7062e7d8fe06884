"""Sphinx configuration."""

import __future__

import importlib.abc
import importlib.machinery
import re
import sys
from typing import Any

import latex2mathml.converter
from docutils import nodes


class _AsWritten(importlib.machinery.SourceFileLoader):
    """Leaves annotations as they are written, so that Sphinx can show a type's own name."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return compile(self.get_data(path), path, "exec", __future__.annotations.compiler_flag)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the library for that loader."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != "optax_spd":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _AsWritten(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder())

import optax_spd  # noqa: E402

project = "optax_spd"
author = "The optax_spd authors"
release = optax_spd.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"optax_spd {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False

napoleon_use_ivar = True
napoleon_attr_annotations = False
autosummary_generate = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Shown by name, and explained on the API page.
autodoc_type_aliases = {
    name: name.rpartition(".")[2]
    for name in [
        *("Anchor", "AxisName", "DType", "Frozen", "LayerFn", "Mask", "Norm", "PyTree", "Score"),
        *("checks.Schedule", "checks.ScalarOrSchedule", "optax.ScalarOrSchedule"),
        *("jax.Array", "jax.typing.ArrayLike"),
        *("optax.GradientTransformation", "optax.GradientTransformationExtraArgs"),
    ]
}
maximum_signature_line_length = 70


def _mathml(display: str) -> Any:
    """Renders equations while building, so that pages need neither a script nor a network."""

    def visit(self: Any, node: nodes.math | nodes.math_block) -> None:
        tex = node.astext()
        converted = latex2mathml.converter.convert(tex, display=display)
        tag = "div" if display == "block" else "span"
        self.body.append(f'<{tag} class="math">{converted}</{tag}>')
        raise nodes.SkipNode

    return visit, None


def _plain_aliases(*event: Any) -> tuple[str, str]:
    """Sphinx prints an alias inside a union as TypeAliasForwardRef('Name'): leaves the name."""
    *_, signature, returned = event
    return tuple(
        text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
        for text in (signature, returned)
    )


def setup(app: Any) -> None:
    """Registers what Sphinx calls."""
    app.connect("autodoc-process-signature", _plain_aliases)
    app.add_html_math_renderer("mathml", _mathml("inline"), _mathml("block"))
