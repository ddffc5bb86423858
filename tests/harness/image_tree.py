"""Writes a cached data set as a tree of PNG files, train/CLASS/00012.png and test/CLASS/00007.png, for
--dataset FOLDER.

    python tests/harness/image_tree.py data/cifar100.pt cifar100-images
"""
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image


def write(dataset: dict, folder: Path) -> None:
    for part in ("train", "test"):
        for name in dataset["classes"]:
            (folder / part / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(dataset[f"{part}_images"], dataset[f"{part}_labels"])):
            to_pil_image(image).save(folder / part / dataset["classes"][label] / f"{i:05}.png")


if __name__ == "__main__":
    write(torch.load(sys.argv[1], weights_only=True), Path(sys.argv[2]))
