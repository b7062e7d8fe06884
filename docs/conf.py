"""Sphinx configuration."""

import optax_spd

project = "optax_spd"
author = "The optax_spd authors"
release = optax_spd.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
autodoc_typehints = "none"
exclude_patterns = ["_build"]
suppress_warnings = ["myst.xref_missing"]
