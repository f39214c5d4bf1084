"""Make what an index shows of the package from README.md. Everything else is in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

PICTURE = re.compile(r"(?:!\[[^\]]*\]\((?!https?:)[^)]*\)|<img[^>]*\bsrc=\"(?!https?:)[^>]*>)\n*")
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!https?:)[^)]*\)")
COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
WHERE = "\nThe source distribution has the pictures and the pages of the documentation, in its folder `docs`.\n"


def description(readme: str) -> str:
    """Write the README without what leads into the repository: on an index such links and pictures lead nowhere.

    Links to `https:` stay. Others leave their words behind. Code stays as it is.
    """
    parts = FENCED.split(readme)
    for number in range(0, len(parts), 2):
        parts[number] = PICTURE.sub("", LINK.sub(r"\1", COMMENT.sub("", parts[number])))
    return "".join(parts) + WHERE


if __name__ == "__main__":
    setup(
        long_description=description((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
