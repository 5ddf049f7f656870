"""CIFAR-10 images: read from one file, cropped, flipped and cut out at random.

The file is an ``.npz`` with ``jpeg`` (the bytes of all images, one after the other), ``offsets`` (where each begins,
and the end), ``labels`` and ``split`` (0 train, 1 test). JPEG is lossy: accuracies on such copies are not those on the
original images. Decoded images live in memory only.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fishmask.errors import FishError

SIZE = 32
_BORDER = 4
_HOLE = 8
_MEAN = (125.31, 122.95, 113.87)  # of the original training images, on 0–255
_DEVIATION = (62.99, 62.09, 66.70)
_PARTS = ("jpeg", "offsets", "labels", "split")
_CLASSES = 10


def read_images(path: Path, split: Literal["train", "test"], count: int | None = None) -> tuple[Tensor, Tensor]:
    """Read and decode the images of one part.

    Args:
        path: The ``.npz`` file.
        split: Which part.
        count: Take only so many: of every class equally many, the first ones. All by default.

    Returns:
        Pixels, uint8 ``[N, 32, 32, 3]``, and labels, int64 ``[N]``, in the order of the file.

    Raises:
        FishError: Pillow is not installed, or the file has other contents than these.
        ValueError: ``count`` is not a positive multiple of ten, or there are not so many images.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise FishError("decoding JPEG images needs Pillow: pip install pillow") from error
    if count is not None and (count < _CLASSES or count % _CLASSES):
        raise ValueError(f"a number of images must be a positive multiple of {_CLASSES}, got {count}")
    with np.load(path, allow_pickle=False) as file:
        if lacking := [name for name in _PARTS if name not in file]:
            raise FishError(f"{path} must hold {', '.join(_PARTS)}; it lacks {', '.join(lacking)}")
        jpeg, offsets, labels, splits = (file[name] for name in _PARTS)
    chosen = np.flatnonzero(splits == (0 if split == "train" else 1))
    if count is not None:
        each = count // _CLASSES
        by_class = [chosen[labels[chosen] == label][:each] for label in range(_CLASSES)]
        if short := [label for label, rows in enumerate(by_class) if len(rows) < each]:
            raise ValueError(f"{count} images were asked for, but {path} has fewer than {each} of the classes {short}")
        chosen = np.sort(np.concatenate(by_class))
    pixels = np.empty((len(chosen), SIZE, SIZE, 3), np.uint8)
    for place, row in enumerate(chosen):
        with Image.open(io.BytesIO(jpeg[offsets[row] : offsets[row + 1]].tobytes())) as image:
            pixels[place] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels), torch.from_numpy(labels[chosen].astype(np.int64))


def normalised(pixels: Tensor) -> Tensor:
    """Return uint8 pixels ``[B, H, W, 3]`` as float32 ``[B, 3, H, W]`` of about zero mean and unit deviation.

    Source:
        The constants of davidcpage/cifar10-fast. The result has PyTorch's channels-last layout.
    """
    mean, deviation = (torch.tensor(constant, device=pixels.device) for constant in (_MEAN, _DEVIATION))
    return ((pixels - mean) / deviation).permute(0, 3, 1, 2)


class TrainingImages:
    """Training images on a device, padded by reflection.

    Args:
        pixels: uint8 ``[N, 32, 32, 3]``.
        labels: int64 ``[N]``.
        device: Where batches are made.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, device: torch.device) -> None:
        border = (0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0)
        self._padded = torch.from_numpy(np.pad(pixels.numpy(), border, mode="reflect")).to(device)
        self._labels = labels.to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch in a random order; images that do not fill a batch are dropped.

        Every image is cropped to 32×32, flipped with probability ½, and an 8×8 hole is set to zero (the mean).

        Args:
            size: Images in a batch.
            rng: Decides order, crops, flips and holes; all of it is drawn before the first batch.

        Yields:
            Images, float32 ``[size, 3, 32, 32]``, and labels, int64 ``[size]``.

        Source:
            ``Crop(32, 32)``, ``FlipLR()``, ``Cutout(8, 8)`` of davidcpage/cifar10-fast.
        """
        count = len(self)
        order = rng.permutation(count)
        corners = rng.integers(0, 2 * _BORDER + 1, (2, count))
        flips = rng.integers(0, 2, count)
        holes = rng.integers(0, SIZE - _HOLE + 1, (2, count))
        drawn = torch.from_numpy(np.stack([order, *corners, flips, *holes])).to(self._labels.device)
        for start in range(0, count - size + 1, size):
            yield self._batch(drawn[:, start : start + size])

    def _batch(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Make the images of one slice of what was drawn: index, top, left, flip, top and left of the hole."""
        index, top, left, flip, hole_top, hole_left = drawn[:, :, None]
        along = torch.arange(SIZE, device=drawn.device)
        rows, columns = top + along, left + torch.where(flip == 1, SIZE - 1 - along, along)
        images = normalised(self._padded[index[:, :, None], rows[:, :, None], columns[:, None, :]])
        inside = [(corner <= along) & (along < corner + _HOLE) for corner in (hole_top, hole_left)]
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return images.masked_fill_(hole, 0.0), self._labels[index[:, 0]]
