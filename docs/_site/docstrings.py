"""Docstrings as the pages show them: names in Sphinx's roles become links, where there is a page for them."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(?P<short>~?)(?P<name>[^`]+)`")
# "Raises:" with a sentence in place of "SomeError: why", which the parser would drop.
RAISES = re.compile(r"^(?P<indent> *)Raises:\n(?P<body>(?:(?P=indent) +.*\n?|\n)+)", re.MULTILINE)
ERROR = re.compile(r"^\s*[A-Z]\w*(?:, [A-Z]\w*)*:")


def link(match: re.Match[str], within: griffe.Object) -> str:
    """A role as a link that may lead nowhere: then it is shown as code."""
    name = match["name"]
    short = name.rsplit(".", 1)[-1] if match["short"] else name
    target = name
    if "." not in name:  # a name of the same class or module
        owner = within if isinstance(within, griffe.Class | griffe.Module) else within.parent
        target = name if owner is None else f"{owner.path}.{name}"
    return f'<autoref identifier="{target}" optional><code>{short}</code></autoref>'


def plain_raises(match: re.Match[str]) -> str:
    """Sentences of a section "Raises" as a paragraph, errors as they were."""
    indent, lines = match["indent"], match["body"].splitlines()
    sentences, errors = [], []
    for line in lines:
        if ERROR.match(line) or (errors and line.strip()):
            errors.append(line)
        else:
            sentences.append(line.strip())
    said = " ".join(s for s in sentences if s)
    if not said:
        return match[0]
    paragraph = f"{indent}Raises {said[0].lower()}{said[1:]}\n\n"
    return paragraph + (f"{indent}Raises:\n" + "\n".join(errors) + "\n" if errors else "")


class ReadableDocstrings(griffe.Extension):
    """Rewrites every docstring that was read from the sources."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ARG002
        """One object, with its docstring as written."""
        if obj.docstring is None:
            return
        text = RAISES.sub(plain_raises, obj.docstring.value)
        obj.docstring.value = ROLE.sub(lambda m: link(m, obj), text).replace("``", "`")
