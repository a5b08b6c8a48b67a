"""What the docstrings say in reStructuredText, in the markdown that mkdocs reads."""

import re
import textwrap

import griffe


def to_markdown(text: str) -> str:
    """Return a docstring with its formulas between dollars and its doctests as a section of examples."""
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r"(?m)^( *)\.\. math::(?:[ \t]*\n+(?=\1 ))?[ \t]*(.+(?:\n\1 +\S.*)*)", block, text)
    text = re.sub(r"(?m)^Example:$", "Examples:", text)
    return re.sub(r"::(?=\n\n {4})", ":", text)


def block(match: re.Match) -> str:
    """Return one formula on lines of its own, its columns aligned as Sphinx aligns them."""
    first, _, rest = match[2].partition("\n")
    formula = "\n".join(part for part in (first.strip(), textwrap.dedent(rest).strip()) if part)
    if "&" in formula:
        formula = f"\\begin{{aligned}}\n{formula}\n\\end{{aligned}}"
    return textwrap.indent(f"\n$$\n{formula}\n$$\n", match[1])


class Markdown(griffe.Extension):
    """Rewrites each docstring before mkdocstrings reads it."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Griffe calls this for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
