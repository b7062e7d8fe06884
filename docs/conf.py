"""Sphinx configuration."""

import re
from typing import Any

import latex2mathml.converter
from docutils import nodes

import optax_spd

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
