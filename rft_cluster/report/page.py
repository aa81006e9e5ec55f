"""Make one HTML file of a template, styles, scripts and data: nothing is loaded from elsewhere, and nothing else runs.

The content-security policy allows the file's own scripts and styles, by their SHA-256, and images in the file itself.
So a text that became markup, which nothing here should let happen, could still not run.
"""

import base64
import gzip
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rft_cluster.common.text import JOINERS, percent

FOLDER = Path(__file__).parent / "page"
LIBRARY = ("uPlot.LICENSE.txt", "uPlot.iife.min.js")
KEPT = f"{JOINERS}\n"  # of the characters that are shown as an escape otherwise


def render(template: str, context: Mapping[str, Any], data: Mapping[str, Any], scripts: Iterable[str]) -> str:
    """The page. `template`: a file of `page/`, which extends `base.html`. `data`: JSON values for the scripts by name;
    the scripts get them with `await unpacked(name)`. `scripts`: files of `page/`, in order; they share one scope.
    """
    own = "\n".join(_read(name) for name in ("shown.js", "base.js", *scripts))
    blocks = {
        "library": _commented(_read(LIBRARY[0])) + _read(LIBRARY[1]),
        "script": f'"use strict";(() => {{\n{own}\n}})();',
        "style": _read("uPlot.min.css") + _read("page.css"),
    }
    policy = (
        f"default-src 'none'; script-src {_hash(blocks['library'])} {_hash(blocks['script'])}; "
        f"style-src {_hash(blocks['style'])}; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"shown": visible, "percent": percent, "size": _size}
    parts = {name: Markup(text) for name, text in blocks.items()}
    packed = {name: Markup(pack(value)) for name, value in data.items()}
    return environment.get_template(template).render(
        **context,
        policy=Markup(policy),
        blocks=parts,
        data=packed,
    )


def pack(value: Any) -> str:
    """JSON, compressed, in base64: a tenth of the bytes of completions, which repeat much."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def visible(text: object) -> str:
    """A text of data, model or file name as people may see it: what controls a terminal, or the direction of text, is
    an escape. Line ends stay. The page's scripts do the same (`shown.js`)."""
    return "".join(c if c in KEPT or unicodedata.category(c)[0] != "C" else repr(c)[1:-1] for c in str(text))


def _size(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _commented(licence: str) -> str:
    return f"/*\n{licence.strip()}\n*/\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
