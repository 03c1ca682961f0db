"""How Sphinx makes the site from the pages in ``docs/``: ``make docs``."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx

project = "Holdfast"
release = version = installed_version("holdfast")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["site", "own_loop"]

# Pages are plain Markdown: a link to a heading is written as repository hosts write it.
myst_heading_anchors = 3
# In docstrings, `single` backticks are code as ``double`` ones are.
default_role = "code"
smartquotes = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Batch", "Inputs", "Records", "Split")}
add_module_names = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"Holdfast {release}"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e5f", "color-brand-content": "#0b6e5f"},
    "dark_css_variables": {"color-brand-primary": "#4fd1b8", "color-brand-content": "#4fd1b8"},
}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False


OF_THE_REPOSITORY = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files at the top of the repository, and the pages that include them."""
INCLUDE = re.compile(r"```\{include\} \.\./(\S+)\n```")
LINK = re.compile(r"\]\((?![a-z]+:|#)(docs/)?([^)#]+)")


def with_included_file(app: Sphinx, _page: str, source: list[str]) -> None:
    """Put the file that a page includes in its place, with links as the page has to write them."""

    def link(found: re.Match[str]) -> str:
        folder, name = found.groups()
        return f"]({name if folder else OF_THE_REPOSITORY.get(name, f'../{name}')}"

    def content(found: re.Match[str]) -> str:
        path = Path(app.srcdir).parent / found[1]
        app.env.note_dependency(str(path))
        return LINK.sub(link, path.read_text(encoding="utf-8"))

    source[0] = INCLUDE.sub(content, source[0])


def without_constructor(
    _app: Sphinx, what: str, _name: str, documented: object, *_more: Any
) -> tuple[str, None] | None:
    """Leave out the signature of pydantic models and protocols: their fields are listed."""
    is_class = what == "class" and inspect.isclass(documented)
    is_listed = is_class and (
        issubclass(documented, BaseModel) or getattr(documented, "_is_protocol", False)
    )
    return ("", None) if is_listed else None


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", with_included_file)
    app.connect("autodoc-process-signature", without_constructor)
