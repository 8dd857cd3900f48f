"""The documentation site. `scripts/docs` builds it, with warnings as errors."""

import os
import sys
from importlib.metadata import version as version_of

# Eight virtual devices for the notebooks, as the tests have them, and no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# The notebooks and the reference are about this checkout, not about what is installed.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "docs", "_extensions")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

project = "ckpt_jax"
author = "the authors of ckpt_jax"
copyright = f"2026, {author}"
release = version = version_of("ckpt-jax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "reference",
    "closed_site",
    "every_page",
]
exclude_patterns = ["_build", "_extensions", "pictures"]

# Markdown: headings can be linked to, as on GitHub.
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4

# Notebooks are executed when the site is built. A cell that fails fails the build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # would come from the network, and no notebook has widgets

# The reference, from the docstrings.
add_module_names = False
toc_object_entries = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style"), ("Law", "notes_style")]
default_role = "code"  # `name` in a docstring is code, as in Markdown
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "ckpt_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search is in the sidebar
    "use_download_button": False,
    "use_fullscreen_button": False,
    "path_to_docs": "docs",
    "logo": {"text": "ckpt_jax"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
