"""How Sphinx builds the documentation: `sphinx-build -W -b html docs build/docs`."""

from __future__ import annotations

from fxfuse.version import __version__

project = "fxfuse"
author = "the authors of fxfuse"
copyright = "the authors of fxfuse"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["*.jinja"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"  # docstrings have names and shapes in single backquotes

html_theme = "furo"
html_title = f"fxfuse {__version__}"
html_static_path = ["_static"]
html_css_files = ["fxfuse.css"]
html_theme_options = {"top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("References", "notes_style")]
