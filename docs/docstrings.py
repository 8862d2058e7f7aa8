"""Reads docstrings as Keras writes them: Markdown sections, doctests unindented."""

import re

from griffe import Extension

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
HEADING = re.compile(r"^(Examples?|References?):$", re.MULTILINE)


class Markdown(Extension):
    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring:
            text = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = HEADING.sub(r"**\1**", text)
