"""Draws what MNIST's generators make, for the documents: python -m benchmarks.pictures --generators FILE

FILE is a generators-0.safetensors of `kegfast reproduce mnist`. Above, a row per label and the generators
side by side, a column per noise vector; below, from label 0 to label 5, a row per generator.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.chart import ASSETS
from kegfast._util.files import atomic_write
from kegfast._util.html import tiled
from kegfast.experiments.pictures import grid, walk
from kegfast.extraction import Generators

GAP = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generators", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ASSETS / "generators-mnist.png")
    args = parser.parse_args()
    made, draw = Generators.load(args.generators), torch.Generator().manual_seed(0)
    parts = [tiled(grid(made, draw, 3)), tiled(walk(made, draw, 15))]
    width = max(part.shape[1] for part in parts)
    picture = np.full((sum(len(part) for part in parts) + GAP, width, 3), 255, np.uint8)
    picture[: len(parts[0]), : parts[0].shape[1]] = parts[0]
    picture[len(parts[0]) + GAP :, : parts[1].shape[1]] = parts[1]
    with atomic_write(args.out) as temporary:
        Image.fromarray(picture).quantize(8).save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
