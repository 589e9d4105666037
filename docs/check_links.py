"""Every link inside a built site leads to a page and a place that are there.

    python docs/check_links.py build/docs

Links to other sites are not followed: the build asks the network for nothing.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse


class Page(HTMLParser):
    """The links and the places of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what links and what can be linked to."""
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.places.add(value)
            elif name in ("href", "src"):
                self.links.append(value)


def broken(folder: Path) -> list[str]:
    """Return each link that leads nowhere, with its page."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links:
            url, place = urldefrag(link)
            if urlparse(url).scheme or url.startswith("//"):
                continue
            target = (path.parent / unquote(urlparse(url).path)).resolve() if url else path
            there = target in pages and (not place or unquote(place) in pages[target].places)
            if not (there or target.is_file() and target.suffix != ".html"):
                found.append(f"{path.relative_to(folder.resolve())}: {link}")
    return found


def main() -> None:
    """Print the broken links of the folder that is named, and fail if there are any."""
    folder = Path(sys.argv[1])
    found = broken(folder)
    print(
        "\n".join(found)
        or f"links of {len(list(folder.rglob('*.html')))} pages: all lead somewhere"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
