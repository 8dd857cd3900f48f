"""Puts a page that `index.md` does not name yet at the end of its "How to"."""

import re
from pathlib import Path

_TOCTREE = re.compile(r"(:caption: How to\n.*?)(\n```)", re.DOTALL)


def add_unnamed(app, name, source):
    if name == "index":
        pages = sorted(file.stem for file in Path(app.srcdir).glob("*.md"))
        named = {"index", *re.findall(r"^([\w/-]+)$", source[0], re.MULTILINE)}
        unnamed = "".join([f"\n{page}" for page in pages if page not in named])
        source[0] = _TOCTREE.sub(rf"\1{unnamed}\2", source[0])


def setup(app):
    app.connect("source-read", add_unnamed)
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: ["index"])
    return {"parallel_read_safe": True}
