"""Where the files lie that are not code and that an export starts from: configurations and the model repository.

They have one place, in the checkout. A wheel carries a copy of them inside the package; an editable install has none.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]
_IN_WHEEL = _PACKAGE / "_data"


def locate(folder: str) -> Path:
    """Return where a folder of the checkout lies (`export/configs`, `model_repository`), here or in the wheel."""
    return (_IN_WHEEL if _IN_WHEEL.is_dir() else _CHECKOUT) / folder


def is_in_wheel(path: Path) -> bool:
    """Whether a path lies among the files of a wheel."""
    return path.resolve().is_relative_to(_IN_WHEEL)
