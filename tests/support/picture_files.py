"""Small folders of images and masks, as users have them."""

import numpy as np
from PIL import Image

SIZE = (20, 24)


def write_image(path, seed=0):
    """A random picture; the same for the same seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype="uint8")
    Image.fromarray(pixels).save(path)


def write_mask(path, seed=0, classes=3):
    """A mask of random classes, and of ignored pixels (255) in its first rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, classes, SIZE, dtype="uint8")
    pixels[:8] = 255
    Image.fromarray(pixels).save(path)


def flat(folder, count=6):
    """A folder of images without labels."""
    for i in range(count):
        write_image(folder / f"{i}.png", i)
    return folder


def classes(folder, names=("cat", "dog"), count=3):
    """Class folders of images."""
    for place, name in enumerate(names):
        for i in range(count):
            write_image(folder / name / f"{i}.png", 10 * place + i)
    return folder
