"""The site: `make docs`. It asks for nothing from elsewhere, neither when it is built nor when it is read."""

import os

import clipcap_jax

project = "clipcap_jax"
version = release = clipcap_jax.__version__
html_theme = "furo"
html_title = f"clipcap_jax {version}"
html_show_copyright = False

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # those that GitHub makes, so that the pages' links hold in both places
nb_execution_mode = "force"  # the notebook is kept without outputs, and run anew for every site
# It wants ipywidgets, which would have the page load scripts from elsewhere.
os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:rich.live"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_custom_sections = [("Attributes", "params_style")]  # a list, in which one line may be of several attributes
