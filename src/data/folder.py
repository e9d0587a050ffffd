"""Images of one's own: a folder with a folder of images for each class."""

from pathlib import Path

from data.dataset import Dataset


def load_folder(
    data_dir: str | Path,
    *,
    img_size: int | None = None,
    in_chans: int | None = None,
    resize: str = "crop",
    val_split: float | None = None,
    test_split: float | None = None,
    cache_dir: str | Path | None = None,
) -> Dataset:
    raise NotImplementedError
