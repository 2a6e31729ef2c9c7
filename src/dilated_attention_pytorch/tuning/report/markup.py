"""Building HTML and SVG in which no text can be taken for markup: the standard library's serialiser escapes it."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, tostring

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters (a terminal obeys them, a document may not hold them) and halves of a pair, which UTF-8 lacks."""


def printable(text: str) -> str:
    """The text with a � for each character that can neither be printed nor encoded; tabs and line feeds stay."""
    return _UNPRINTABLE.sub("�", text)


def tag(name: str, /, *children: str | Element, **attributes: object) -> Element:
    """An element with text and elements inside.

    Args:
        name: Such as "td".
        children: In order.
        attributes: By name; `class_` is class, `aria_label` is aria-label, and one that is None is left out.
    """
    element = Element(name)
    for key, value in attributes.items():
        if value is not None:
            element.set(key.rstrip("_").replace("_", "-"), printable(str(value)))
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + printable(child)
        else:
            element.text = (element.text or "") + printable(child)
    return element


def document(root: Element) -> str:
    """The text of an HTML file. What `<style>` and `<script>` hold is written as it is."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
