"""Sphinx: the API reference, from the docstrings. ``make docs`` builds it into build/docs."""

import maia_rt

project = "maia_rt"
author = "the maia_rt authors"
release = maia_rt.__version__
extensions = ["sphinx.ext.autodoc", "numpydoc"]
html_theme = "pydata_sphinx_theme"
html_theme_options = {"show_prev_next": False, "secondary_sidebar_items": ["page-toc"]}
html_show_copyright = False
autodoc_typehints = "none"  # the signature's types stand in the parameters' texts, in words
autodoc_default_options = {"members": True}
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
