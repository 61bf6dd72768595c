"""Plain prose from MediaWiki markup: paragraphs are kept; tables, templates and notes are not.

Not a parser: markup is removed from the inside out with regular expressions until nothing changes,
which is what nesting needs. It reads all it must here, the articles of two English dumps.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

# Sections that hold lists of links and sources instead of prose, to the end of the article or the
# next section of the same level.
_BACK_MATTER = {
    "bibliography",
    "citations",
    "discography",
    "external links",
    "filmography",
    "footnotes",
    "further reading",
    "gallery",
    "notes",
    "notes and references",
    "publications",
    "references",
    "related topics",
    "see also",
    "selected bibliography",
    "sources",
    "works cited",
}

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_EMPTY_TAG = re.compile(r"<(?:ref|references|br|hr|nowiki|section)\b[^<>]*/>", re.I)
# Elements whose content is no prose either.
_ELEMENT = re.compile(
    r"<(ref|gallery|math|source|syntaxhighlight|timeline|imagemap|score|table|hiero|chem)\b[^<>]*>"
    r".*?</\1\s*>",
    re.I | re.S,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_PARAMETER = re.compile(r"\{\{\{[^{}]*\}\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.S)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]*\s*([^\[\]]*)\]")
_BARE_URL = re.compile(r"https?://[^\s<>|\]}]+")
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$")
_NAMESPACES = re.compile(
    r"\s*:?(?:file|image|category|media|wikt|wikipedia|portal|template)\s*:", re.I
)
_LANGUAGE_LINK = re.compile(r"\s*[a-z]{2,3}(?:-[a-z]+)?\s*:")

# Templates that stand for text of their own arguments; all others go.
_SAYS_FIRST = {"nowrap", "small", "smaller", "big", "nobold", "abbr", "tooltip", "vanchor", "angbr"}
_SAYS_FIRST |= {
    "quote",
    "cquote",
    "blockquote",
    "bq",
    "nihongo",
    "val",
    "nts",
    "as written",
    "mvar",
}
_SAYS_LAST = {"lang", "transl", "wikt-lang", "color", "font color"}
_SAYS = {"·": " · ", "ndash": "–", "mdash": "—", "spaced ndash": " – ", "snd": " – ", "nbsp": " "}
_SAYS |= {"'": "'", "'s": "'s", "pipe": "|", "!": "|", "sic": "", "spaces": " "}
_RANGE_WORDS = {"-", "–", "to", "and", "by", "or", "x", "×"}


def to_prose(markup: str) -> str:
    """The paragraphs of an article's wiki markup as plain text, with one empty line between them.

    Section titles stay as paragraphs of their own where text follows; list items start with "- ".
    References, tables, images, infoboxes and the closing sections (see also, sources, links) go.
    """
    text = _COMMENT.sub("", markup)
    text = _until_stable(text, lambda t: _ELEMENT.sub("", _EMPTY_TAG.sub(" ", t)))
    text = _until_stable(text, lambda t: _TEMPLATE.sub(_template, _PARAMETER.sub("", t)))
    text = _until_stable(text, lambda t: _TABLE.sub("", t))
    text = _until_stable(text, lambda t: _LINK.sub(_link, t))
    text = _BARE_URL.sub("", _EXTERNAL.sub(r"\1", text))
    text = re.sub(r"'{2,5}", "", text)
    text = re.sub(r"__[A-Z]+__", "", text)
    text = html.unescape(html.unescape(_TAG.sub("", text))).replace("\xa0", " ")
    return "\n\n".join(_paragraphs(text))


def _until_stable(text: str, step: Callable[[str], str]) -> str:
    while (shorter := step(text)) != text:
        text = shorter
    return text


def _template(match: re.Match[str]) -> str:
    # A link's "|" is not a separator of arguments; links are still there when templates are read.
    fields = re.split(r"\|(?![^\[\]]*\]\])", match.group(1))
    name = fields[0].strip().lower().replace("_", " ")
    values = [f.strip() for f in fields[1:] if not re.match(r"\s*[\w-]+\s*=", f)]
    if name in _SAYS:
        return _SAYS[name]
    if not values:
        return ""
    if name in _SAYS_FIRST:
        return values[0]
    if name in _SAYS_LAST or name.startswith("lang-"):
        return values[-1]
    if name in ("convert", "cvt"):
        return _quantity(values)
    if name in ("circa", "c."):
        return f"c. {values[0]}"
    if name in ("frac", "fraction") and len(values) > 1:
        return "/".join(values[-2:])
    return ""


def _quantity(values: list[str]) -> str:
    """`{{convert|5|-|6|km|mi}}` reads "5-6 km": up to the first field that is a unit."""
    said = []
    for value in values:
        said.append(value)
        if not (value in _RANGE_WORDS or re.fullmatch(r"[-−+]?[\d.,/ ]+", value)):
            break
    *numbers, unit = said
    return f"{' '.join(numbers)} {unit}".strip()


def _link(match: re.Match[str]) -> str:
    target, _, label = match.group(1).partition("|")
    if _NAMESPACES.match(target) or (_LANGUAGE_LINK.match(target) and not label):
        return "" if not target.lstrip().startswith(":") else label
    # A caption's last field is its label; "[[Paris|]]" says Paris.
    return (label.rpartition("|")[2] or target.removeprefix(":")).strip("\n")


def _paragraphs(text: str) -> list[str]:
    kept: list[str] = []
    titles: list[tuple[int, str]] = []  # section titles that no text has followed yet
    skip = 0  # level of the closing section being left out, 0 if none
    for block in re.split(r"\n", text):
        if heading := _HEADING.match(block.strip()):
            level, title = len(heading[1]), _tidy(heading[2])
            if skip and level > skip:
                continue
            skip = level if title.lower() in _BACK_MATTER else 0
            titles = [(n, t) for n, t in titles if n < level]
            if not skip and title:
                titles.append((level, title))
            continue
        line = _line(block)
        if not skip and line:
            kept += [title for _, title in titles]
            titles = []
            kept.append(line)
    return kept


def _line(raw: str) -> str:
    """One line of text, or "" if it holds markup or nothing but punctuation."""
    raw = raw.strip()
    # Left over from unbalanced tables and templates.
    if raw.startswith(("|", "!", "{|", "}}", "{{", "[[", "]]")) or "||" in raw:
        return ""
    marker = re.match(r"[*#:;]+", raw)
    line = raw[marker.end() :] if marker else raw
    # A template that never closes: the rest of the line is its arguments.
    line = _tidy(re.sub(r"\{\{.*|\}\}|\[\[|\]\]", "", line))
    if len(re.findall(r"\w", line)) < 2:
        return ""
    return f"- {line}" if marker and raw[0] in "*#" else line


def _tidy(text: str) -> str:
    """Mend what removals leave: empty brackets, spaces before commas, runs of spaces."""
    for _ in range(2):
        text = re.sub(r"\(\s*[,;:–/-]*\s*\)|\[\s*\]", "", text)
        text = re.sub(r"([(\[])\s*[,;:]+\s*", r"\1", text)
        text = re.sub(r"\s*[,;:]+\s*\)", ")", text)
        text = re.sub(r"\s+([,;.:)])(?!\w)", r"\1", text)
        text = re.sub(r"([,;])(?:\s*[,;])+", r"\1", text)
        text = re.sub(r"\s+", " ", text).strip()
    return text
