"""Checks the site when it is built: every link within it leads somewhere, and nothing is loaded
from the network. Links to other sites are only links, and are not followed.
"""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.util import logging

log = logging.getLogger(__name__)


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads = {""}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.update(filter(None, [found.get("id"), found.get("name")]))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("canonical", "search", "index", "next", "prev"):
            return
        else:
            self.loads += [found[name] for name in ("src", "href") if found.get(name)]


def check(app, error):
    if error is not None or app.builder.name != "html":
        return
    site = Path(app.outdir).resolve()
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    for file, page in pages.items():
        where = file.relative_to(site)
        for address in page.loads:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https") or parts.netloc:
                log.warning("%s loads %s from the network", where, address)
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                log.warning("%s links to %s, which does not exist", where, address)
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                log.warning("%s links to %s, which has no such place", where, address)


def setup(app):
    app.connect("build-finished", check)
    return {"parallel_read_safe": True}
