"""Markup: HTML put together from values, so that nothing reaches a page unescaped."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is HTML already; everything else is escaped when it is put into an element."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. ``class_`` stands for class, ``stroke_width`` for stroke-width; an attribute of ``None`` is left out.

    >>> tag("td", "a < b", tag("b", 3), class_="figure", title=None)
    '<td class="figure">a &lt; b<b>3</b></td>'
    """
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{named}>{join(children)}</{name}>")


def join(parts: object) -> Markup:
    """The parts one after another; a part may be a sequence of parts, and ``None`` is nothing.

    >>> join(["a & b", [Markup("<hr>"), None]])
    'a &amp; b<hr>'
    """
    if parts is None:
        return Markup("")
    if isinstance(parts, Markup):
        return parts
    if isinstance(parts, list | tuple):
        return Markup("".join(join(part) for part in parts))
    return Markup(escape(str(parts)))
