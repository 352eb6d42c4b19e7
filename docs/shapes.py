"""An extension of Griffe: shapes in docstrings, such as [batch, *space, channels], become code."""

import re

import griffe

CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
SHAPE = re.compile(r"\[[^\[\]\n]*(?:\n\s+[^\[\]\n]*)?\](?!\()")


def marked(text: str) -> str:
    """The text of a docstring with backticks around every [...] outside of code."""
    parts = CODE.split(text)
    return "".join(
        part if i % 2 else SHAPE.sub(lambda m: f"`{' '.join(m[0].split())}`", part)
        for i, part in enumerate(parts)
    )


class Shapes(griffe.Extension):
    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = marked(obj.docstring.value)
