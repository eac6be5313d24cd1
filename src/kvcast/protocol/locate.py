"""Where an export finds configurations and the model repository: in the checkout, or the wheel's copy of them."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]
_IN_WHEEL = _PACKAGE / "_data"


def locate(folder: str) -> Path:
    """Return the path of a folder of the checkout (`export/configs`, `model_repository`), here or in the wheel."""
    return (_IN_WHEEL if _IN_WHEEL.is_dir() else _CHECKOUT) / folder


def is_in_wheel(path: Path) -> bool:
    """Whether a path is among the files of a wheel."""
    return path.resolve().is_relative_to(_IN_WHEEL)
