"""The bar of long work on data."""

from typing import Any

from tqdm.auto import tqdm

BAR_DELAY = 5  # seconds before a bar appears


def progress_bar(title: str, unit: str, total: int | None) -> tqdm:
    """A bar that appears if it takes longer; none where the total is not known."""
    options: dict[str, Any] = {"desc": title, "unit": unit, "unit_scale": True, "leave": False}
    return tqdm(total=total, delay=BAR_DELAY, disable=total is None, **options)
