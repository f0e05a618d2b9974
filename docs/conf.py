"""The documentation: prose and tutorials in MyST, the API from the docstrings. Under `make docs` any warning fails."""

import inspect

import pyro_flows

project = "pyro_flows"
author = "the pyro_flows developers"
copyright = "2026, the pyro_flows developers"
release = version = pyro_flows.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"pyro_flows {release}"

# Tutorials are MyST notebooks (../tutorials, reached through a link): executed when changed, and a cell's error fails.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell
nb_merge_streams = True

# What is public is what __all__ names, wherever it is defined.
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"


def _home(name: str) -> str:
    """Where a name of the public face is documented: its layer, such as pyro_flows.vi for pyro_flows.FlowVI."""
    value = getattr(pyro_flows, name)
    if inspect.ismodule(value):
        return value.__name__
    return ".".join([*getattr(value, "__module__", "pyro_flows").split(".")[:2], name])


autosummary_context = {"public_face": [_home(name) for name in pyro_flows.__all__ if not name.startswith("_")]}
