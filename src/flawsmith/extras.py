"""Tells which optional extra of the package brings a module that is missing."""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flawsmith.errors import UserError

# modules whose package is called otherwise, or comes with another
_PACKAGES = {
    "PIL": "pillow",
    "httpx": "prefect",
    "paho": "paho-mqtt",
    "multipart": "python-multipart",
    "psycopg2": "psycopg2-binary",
    "ruamel": "ruamel.yaml",
    "sklearn": "scikit-learn",
    "starlette": "fastapi",
    "yaml": "pyyaml",
}


def packages_of_extras() -> Mapping[str, list[str]]:
    """List the packages that each extra names, by the metadata of what is installed; "" is the package itself.

    Names are canonical (PEP 503). The mapping is empty where only the source files are there.
    """
    try:
        lines = requires("flawsmith") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for item in map(Requirement, lines):
        extra = re.search(r'extra == "([^"]+)"', str(item.marker))
        found.setdefault(extra.group(1) if extra else "", []).append(canonicalize_name(item.name))
    return found


def explain(error: Exception) -> UserError | None:
    """Say what to install for a module that was not found, by the smallest extra that brings it.

    None if it is another error, or no extra brings that module.
    """
    if not isinstance(error, ModuleNotFoundError):
        return None
    module = (error.name or "").partition(".")[0]
    package = canonicalize_name(_PACKAGES.get(module, module))
    bringing = [(len(packages), extra) for extra, packages in packages_of_extras().items() if package in packages]
    return missing(module, min(bringing)[1]) if bringing else None


def missing(module: str, extra: str) -> UserError:
    """Say that a module is missing, and which extra brings it."""
    whole = f"flawsmith[{extra}]" if extra else "flawsmith"
    return UserError(f"This needs `{module}`, which is not installed here; install {whole}: pip install '{whole}'.")
