"""Write docs/methods: one page per method and an index, from the registry, its pages and the recipe's settings.

python scripts/method_pages.py            write them
python scripts/method_pages.py --check    write nothing; exit 1 and name the pages that are not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from quantkit.algorithms.registry import METHODS
from quantkit.cli.pages import index, markdown

FOLDER = Path(__file__).parents[1] / "docs" / "methods"


def pages() -> dict[str, str]:
    """File name to content."""
    return {"README.md": index()} | {f"{name}.md": markdown(name) for name in METHODS}


def outdated(folder: Path) -> list[str]:
    """Files that are missing, superfluous, or differ."""
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    wanted = pages()
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def main() -> int:
    names = outdated(FOLDER)
    if "--check" in sys.argv[1:]:
        print("\n".join(f"docs/methods/{name} is not up to date" for name in names), end="\n" if names else "")
        return 1 if names else 0
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        content = pages().get(name)
        if content is None:
            (FOLDER / name).unlink()
        else:
            (FOLDER / name).write_text(content, encoding="utf-8")
        print(f"{'removed' if content is None else 'written'}: docs/methods/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
