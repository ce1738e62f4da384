"""Calls of the command line, and pages taken apart, for the tests of this folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import pytest
from typer.testing import CliRunner

from python_experiments import style
from python_experiments.cli import app

VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})


def call(*arguments: object, code: int = 0) -> Any:
    """Call the command line in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def drafts(patch: pytest.MonkeyPatch) -> None:
    """Store plots in half the resolution, and as PNG alone."""
    patch.setattr(style, "DPI", 80)
    patch.setattr(style, "SUFFIXES", (".png",))


class ExitsWhenUsed:
    """Stands for the folder of runs; the process that looks into it ends at once, with exit code 3."""

    def __fspath__(self) -> str:
        os._exit(3)


@dataclass
class Element:
    """One element of a page: its tag, attributes, and what is in it."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """Every element with that tag in this one, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] * (child.tag == tag) + child.all(tag)
        return found

    @property
    def text(self) -> str:
        """Its words, with spaces as they are."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Page(HTMLParser):
    """A page as a tree. An element that is closed out of turn, or never, is an error.

    Attributes:
        root: holds the whole page.
        links: every value that makes a browser fetch or go somewhere.
    """

    LINKS = ("src", "srcset", "href", "data", "action", "poster")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.links: list[str] = []
        self._open = [self.root]
        self.feed(html)
        self.close()
        assert self._open == [self.root], f"<{self._open[-1].tag}> is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        element = Element(tag, dict(attrs))
        self.links += [element.attributes[name] or "" for name in self.LINKS if name in element.attributes]
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        """Close the element that is open."""
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}> at {self.getpos()}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        """Keep the words."""
        self._open[-1].children.append(data)


def letters(text: str) -> str:
    """Text without spaces, formulas as the page sets them: "L_<=5" is L and a subscript there."""
    return "".join(text.replace("L_<=", "L≤").replace("L_>", "L>").split())
