"""Shows the rest of the repository in the site: pages, pictures, and flagfiles outside of docs/.

In the repository, docs/ is one folder among others and links such as ../experiments/x.png work
there. In the site, its pages are at the top, and README.md is the first page. So files from outside
get the path that they have in the repository, and links are rewritten to where their target is.
"""

import os
import pathlib
import posixpath
import re

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
DOCS = "docs"
HOME = {"README.md": "index.md"}  # repository -> site
SHOWN = (
    "README.md", "BUILD_NOTES.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE",
    "kernels_pallas/README.md", "colabs/*.md", "colabs/*.ipynb", "experiments/**/*.md",
    "experiments/**/*.png", "experiments/**/*.flags", "experiments/**/*.json",
    "experiments/pods/*.txt", "experiments/**/*.py",
)  # fmt: skip
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_files(files: Files, config) -> Files:
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            place = HOME.get(name, name)
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    here = page.file.src_uri
    inverse = {site: name for name, site in HOME.items()}
    outside = page.file.generated_by is not None
    in_repository = inverse.get(here, here if outside else f"{DOCS}/{here}")

    def moved(match: re.Match) -> str:
        before, link, after = match.groups()
        if re.match(r"[a-z]+:|#|/", link):
            return match[0]
        path, hash_, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), path))
        target = target.removeprefix(f"{DOCS}/") if target.startswith(f"{DOCS}/") else target
        target = HOME.get(target, target)
        relative = os.path.relpath(target, posixpath.dirname(here) or ".")
        return f"{before}{relative}{hash_}{anchor}{after}"

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page, config) -> str:
    """Without a network, the search's stand-in for workers is the one in docs/, not a download."""
    local = os.path.relpath("search_offline.js", posixpath.dirname(page.url) or ".")
    return output.replace("https://unpkg.com/iframe-worker/shim", local)
