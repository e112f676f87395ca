"""CIFAR-10 from parquet files of encoded images, as dataset hubs distribute it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.augment import Chain, Crop, Flip
from kirsch.data.dataset import DataSet, Split
from kirsch.data.sources.registry import SOURCES
from kirsch.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = Chain(Crop(4), Flip())
"""Shift by up to 4 pixels with zero padding, and mirror with probability 0.5."""


def data_folder() -> Path:
    """Return the folder of optional data sets: `$KIRSCH_DATA`, or ../shared/data."""
    return Path(os.environ.get("KIRSCH_DATA", "../shared/data"))


@SOURCES.register("cifar10")
def cifar10(
    *,
    seed: int,
    train: int = 45_000,
    validation: int = 5_000,
    test: int = 10_000,
    augment: bool = True,
    mean: tuple[float, ...] = MEAN,
    deviation: tuple[float, ...] = DEVIATION,
) -> DataSet:
    """Return CIFAR-10 from `cifar10/train.parquet` and `cifar10/test.parquet` of the data folder.

    Args:
        seed: seed of the selection of samples; the files are sorted by class.
        train, validation, test: numbers of samples; the first two come from the training file.
        augment: whether training uses random crops and flips.
        mean, deviation: mean and standard deviation of each color, for pixels from 0 to 1.

    Raises:
        DataError: a part would be empty, a file is missing, or a file has fewer samples.
        MissingExtraError: pyarrow or pillow is not installed.

    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """
    empty = next((name for name, n in {"train": train, "validation": validation, "test": test}.items() if n < 1), None)
    if empty is not None:
        raise DataError(f"The {empty} part of CIFAR-10 would be empty.", fix=f"Give {empty}=1 or more.")
    random = np.random.default_rng(seed)
    shift, scale = (np.array(v, np.float32)[:, None, None] for v in (mean, deviation))

    def part(rows: Any) -> Split:
        images = np.stack([_decode(image["bytes"]) for image in rows["img"]])
        return Split((images / np.float32(255) - shift) / scale, np.array(rows["label"], np.int64))

    training, testing = _table("train"), _table("test")
    order = random.permutation(len(training))
    if train + validation > len(training) or test > len(testing):
        raise DataError(
            f"CIFAR-10 has {len(training):,} training and {len(testing):,} test images; "
            f"{train:,} + {validation:,} and {test:,} are requested.",
            fix="Lower train, validation or test.",
        )
    return DataSet(
        "cifar10",
        part(training.take(order[:train]).to_pydict()),
        part(training.take(order[train : train + validation]).to_pydict()),
        part(testing.take(random.permutation(len(testing))[:test]).to_pydict()),
        classes=CLASSES,
        augment=AUGMENT if augment else None,
    )


def _table(name: str) -> Any:
    path = data_folder() / "cifar10" / f"{name}.parquet"
    if not path.is_file():
        raise DataError(
            f"CIFAR-10 was not found: {path} does not exist.",
            fix="Set KIRSCH_DATA to a folder that holds cifar10/train.parquet and cifar10/test.parquet.",
        )
    try:
        import pyarrow.parquet  # noqa: PLC0415 - optional dependency
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "tasks", "for CIFAR-10") from error
    return pyarrow.parquet.read_table(path, columns=["img", "label"])


def _decode(content: bytes) -> NDArray[np.float32]:
    """Decode JPEG or PNG bytes to an array of shape (3, H, W) with values from 0 to 255."""
    try:
        from PIL import Image  # noqa: PLC0415 - optional dependency
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "tasks", "for CIFAR-10") from error
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1)
