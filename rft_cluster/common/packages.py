"""The packages of this environment."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
