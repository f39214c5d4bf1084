"""What an extra of this package needs, and the line that installs it.

The line names the packages themselves. So it works in a clone, after a wheel was installed from a file, and from an index.
"""

from __future__ import annotations

import re
from importlib import metadata

DISTRIBUTION = "haq"
_ENTRY = re.compile(r"""^(?P<requirement>[^;]+?)\s*;\s*extra\s*==\s*["'](?P<extra>[\w-]+)["']\s*$""")
_OWN = re.compile(rf"^{DISTRIBUTION}\[(?P<extras>[\w,\s-]+)\]$")


def requirements(extra: str) -> list[str]:
    """List the requirements of an extra, such as "onnx>=1.17", with those of extras that it includes.

    Raises:
        PackageNotFoundError: Where the code was not installed, but only put on the path.
        ValueError: For an extra that isn't there.
    """
    entries = [found for text in metadata.requires(DISTRIBUTION) or () if (found := _ENTRY.match(text))]
    if extra not in {found["extra"] for found in entries}:
        raise ValueError(f"there is no extra {extra!r}")
    listed: list[str] = []
    for found in entries:
        if found["extra"] != extra:
            continue
        own = _OWN.match(found["requirement"])
        if own is None:
            listed.append(found["requirement"])
            continue
        for other in own["extras"].split(","):
            listed.extend(requirements(other.strip()))
    return list(dict.fromkeys(listed))


def install_line(extra: str) -> str:
    """Write the command that installs what an extra needs, such as "pip install 'ray>=2.40'"."""
    try:
        needed = requirements(extra)
    except (metadata.PackageNotFoundError, ValueError):
        return f"install the packages of the extra {extra!r} in pyproject.toml"
    return " ".join(["pip install", *(f"'{one}'" for one in needed)])
