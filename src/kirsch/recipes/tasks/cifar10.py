"""CIFAR-10 from parquet files of JPEG images, as the dataset hubs hold it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError, MissingExtraError
from kirsch.frameworks.augment import Chain, Crop, Flip
from kirsch.recipes.tasks.data import SOURCES, DataSet, Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = Chain(Crop(4), Flip())
"""Shifts by up to four pixels over zeros, and mirrored half of the time."""


def data_folder() -> Path:
    """Where optional data sets lie: `$KIRSCH_DATA`, or ../shared/data."""
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
    """CIFAR-10 from `cifar10/train.parquet` and `cifar10/test.parquet` of the data folder.

    Args:
        seed: of which samples are taken; the files are sorted by class.
        train, validation, test: how many samples; the first two come from the training file.
        augment: random crops and flips while training.
        mean, deviation: of each color, for pixels from 0 to 1.

    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """
    random = np.random.default_rng(seed)
    shift, scale = (np.array(v, np.float32)[:, None, None] for v in (mean, deviation))

    def part(rows: Any) -> Split:
        images = np.stack([_decode(image["bytes"]) for image in rows["img"]])
        return Split((images / np.float32(255) - shift) / scale, np.array(rows["label"], np.int64))

    learning, judging = _table("train"), _table("test")
    order = random.permutation(len(learning))
    if train + validation > len(learning) or test > len(judging):
        raise DataError(
            f"CIFAR-10 has {len(learning):,} training and {len(judging):,} test images.",
            f"{train:,} + {validation:,} and {test:,} were asked for.",
            "Ask for fewer.",
        )
    return DataSet(
        "cifar10",
        part(learning.take(order[:train]).to_pydict()),
        part(learning.take(order[train : train + validation]).to_pydict()),
        part(judging.take(random.permutation(len(judging))[:test]).to_pydict()),
        CLASSES,
        AUGMENT if augment else None,
    )


def _table(name: str) -> Any:
    path = data_folder() / "cifar10" / f"{name}.parquet"
    if not path.is_file():
        raise DataError(
            f"CIFAR-10 is not there: {path} does not exist.",
            fix="Set KIRSCH_DATA to a folder that holds cifar10/train.parquet and cifar10/test.parquet.",
        )
    try:
        import pyarrow.parquet  # noqa: PLC0415 - an extra is loaded when it is used
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "tasks", "for CIFAR-10") from error
    return pyarrow.parquet.read_table(path, columns=["img", "label"])


def _decode(content: bytes) -> NDArray[np.float32]:
    """JPEG or PNG bytes as (3, H, W), 0 to 255."""
    try:
        from PIL import Image  # noqa: PLC0415 - an extra is loaded when it is used
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "tasks", "for CIFAR-10") from error
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1)
