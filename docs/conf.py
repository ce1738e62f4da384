"""How the pages of this folder become a site: `make docs`, into build/docs.

Three things are made here: a page for each experiment, from its declaration; tables of a package's files; and
reStructuredText out of docstrings, which are plain text with `names` in backticks.
"""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import catapult_ext  # noqa: E402
from python_experiments import registry, report  # noqa: E402

project = "catapult_ext"
version = release = catapult_ext.__version__
project_copyright = "The catapult_ext developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["templates", "results"]

html_theme = "furo"
html_title = f"catapult_ext {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
highlight_language = "text"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Broken links are errors (make docs: -W). Names of other libraries have no page here; a name in backticks in a
# docstring may be anything, and becomes a link where it is documented.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!catapult_ext|python_experiments).*"), ("py:obj", ".*")]
default_role = "py:obj"
smartquotes_action = "D"  # dashes; quotes are values that somebody copies

autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
autosummary_generate = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Class attributes", "Attributes")]


def as_markdown(text: str) -> str:
    """Text of a declaration for a Markdown page: formulas set, everything else literal."""
    literal = re.sub(r"([\\`*_\[\]{}|$~])", r"\\\1", str(report.formulas(text)))
    return re.sub(r"(?<![\w-])--[a-z][a-z-]*", r"`\g<0>`", literal)


def write_experiments(app: Sphinx) -> None:
    """One page for each declaration, and their table; files that are the same stay untouched."""
    environment = Environment(
        loader=FileSystemLoader(DOCS / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {"text": as_markdown, "entries": report.entries, "asdict": asdict}
    experiments = registry.all_experiments()
    page, table = (environment.get_template(f"{name}.md.j2") for name in ("experiment", "experiments"))
    pages = {name: page.render(experiment=e, presets=registry.PRESETS) for name, e in experiments.items()}
    pages["index"] = table.render(experiments=experiments)

    folder = DOCS / "experiments"
    folder.mkdir(exist_ok=True)
    for stale in {file.stem for file in folder.glob("*.md")} - set(pages):
        (folder / f"{stale}.md").unlink()
    for name, content in pages.items():
        file = folder / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            file.write_text(content, encoding="utf-8")


def list_files(app: Sphinx, page: str, source: list[str]) -> None:
    """`.. files:: PACKAGE` becomes a table of its files, `.. modules:: PACKAGE` all that their docstrings say."""

    def listed(found: re.Match[str]) -> str:
        kind, package = found.groups()
        files = sorted((DOCS.parent / package.replace(".", "/")).glob("*.py"))
        names = [f"{package}.{file.stem}" for file in files if not file.stem.startswith("__")]
        if kind == "files":
            return "\n".join([".. currentmodule:: None", ".. autosummary::", "", *(f"   {n}" for n in names)])
        return "\n".join(f".. rubric:: {n.rpartition('.')[2]}\n\n.. automodule:: {n}\n" for n in names)

    source[0] = re.sub(r"^\.\. (files|modules):: (\S+)$", listed, source[0], flags=re.MULTILINE)


def as_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are no markup: `expressions` become code, `names` links, and everything else is literal.

    What is returned begins with a colon, or napoleon would take the text before its first colon for a type.
    """

    def code(found: re.Match[str]) -> str:
        if found["code"] is None:
            return "\\" + found[0]
        is_name = re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", found["code"])
        return f"`{found['code']}`" if is_name else f"``{found['code']}``"

    text = re.sub(r"`(?P<code>[^`]+)`|[|*]|(?<=\w)_(?!\w)", code, "\n".join(lines))
    lines[:] = re.sub(r"^(\s*Returns:\n\s*)", r"\1: ", text, flags=re.MULTILINE).split("\n")


def without_factories(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """The default of a field with a factory, as something that can be read as Python."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", without_factories)
    app.connect("builder-inited", write_experiments)
    app.connect("source-read", list_files)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
