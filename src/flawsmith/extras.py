"""Which optional extra of the package brings a module, so that one that is missing is told with its remedy."""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires

from flawsmith.errors import UserError

# modules whose package is called otherwise, or comes with another
_PACKAGES = {
    "PIL": "pillow",
    "httpx": "prefect",
    "multipart": "python-multipart",
    "psycopg2": "psycopg2-binary",
    "ruamel": "ruamel.yaml",
    "sklearn": "scikit-learn",
    "starlette": "fastapi",
    "yaml": "pyyaml",
}


def packages_of_extras() -> Mapping[str, list[str]]:
    """The packages that each extra names (of "", the package itself), by the metadata of what is installed.

    Names are `normalised`. Empty where nothing is installed and only the source files are there.
    """
    try:
        lines = requires("flawsmith") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w.-]+)['\"]", line)
        if package:
            found.setdefault(extra.group(1) if extra else "", []).append(normalised(package.group()))
    return found


def explain(error: Exception) -> UserError | None:
    """What to install for a module that was not found; None if it is another error, or no extra brings that module.

    Of several extras that bring it the smallest is named.
    """
    if not isinstance(error, ModuleNotFoundError):
        return None
    module = (error.name or "").partition(".")[0]
    package = normalised(_PACKAGES.get(module, module))
    bringing = [(len(packages), extra) for extra, packages in packages_of_extras().items() if package in packages]
    return missing(module, min(bringing)[1]) if bringing else None


def missing(module: str, extra: str) -> UserError:
    """The sentence to a module that the extra brings."""
    whole = f"flawsmith[{extra}]" if extra else "flawsmith"
    return UserError(f"This needs `{module}`, which is not installed here; install {whole}: pip install '{whole}'.")


def normalised(name: str) -> str:
    """A package's name in the one spelling that pip compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip().partition("[")[0]).lower()
