"""Where the weights err most: a window round the worst place of each pair, for the eye.

    python tests/benchmarks/worst.py DATA [--least 0.1] [--size 512] [--weights FILE] [--save-dir DIR]

An error is light that was left, averaged over 21 x 21 pixels (stars), or light that was taken and should have stayed,
over 41 x 41 (galaxies and nebulae). The pairs whose error reaches --least are listed, the worst first. With --save-dir
their windows become pairs in DIR/left and DIR/taken, the worst x0.png.
"""

import argparse
import functools
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402

SIDES = {"left": 21, "taken": 41}


def worst_place(starless, truth):
    """(kind, error, x, y) of the largest error of a starless image against the truth."""
    light = (starless - truth).mean(axis=2)
    parts = {"left": light.clip(0), "taken": (-light).clip(0)}
    maps = {kind: cv2.blur(part, (SIDES[kind],) * 2) for kind, part in parts.items()}
    kind = max(maps, key=lambda kind: maps[kind].max())
    y, x = np.unravel_index(maps[kind].argmax(), light.shape)
    return kind, float(maps[kind][y, x]), int(x), int(y)


def window(pixels, x, y, size):
    """The square of a picture, as near to the middle (x, y) as its edges allow, and no larger than the picture."""
    top, left = (
        int(np.clip(middle - size // 2, 0, max(length - size, 0))) for middle, length in zip((y, x), pixels.shape)
    )
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def measure(pairs, settings):
    """Table of all pairs, the worst first: name, kind, error, x, y, and the PSNR before and after."""
    load, rows = functools.cache(nox.load_generator), []
    for paths in tqdm(pairs, unit="pair", leave=False):
        starry, truth = (nox.Picture(pixels) for pixels in nox.read_pair(paths, 3))
        starless = starry.with_pixels(starry.without(nox.whole_starlight(starry, settings, load)))
        before, after, truth = (picture.image() for picture in (starry, starless, truth))
        rows.append((paths[0].name, *worst_place(after, truth), nox.psnr(before, truth), nox.psnr(after, truth)))
    columns = ["pair", "kind", "error", "x", "y", "before", "after"]
    return pd.DataFrame(rows, columns=columns).sort_values("error", ascending=False, ignore_index=True)


def save_windows(table, pairs, folder, size):
    """Write the windows of the table's pairs as pairs in folder/left and folder/taken."""
    paths = {path.name: (path, other) for path, other in pairs}
    for kind, rows in table.groupby("kind"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(rows.itertuples()):
            for letter, pixels in zip("xy", nox.read_pair(paths[row.pair], 3)):
                part = nox.Picture(window(pixels, row.x, row.y, size))
                nox.write_picture(folder / kind / f"{letter}{number}.png", part)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="folder of colour pairs")
    parser.add_argument("--least", type=float, default=0.1, help="error from which on a pair is listed, 0..1")
    parser.add_argument("--size", type=int, default=512, help="side of a window: of a crop to train on, or more")
    parser.add_argument("--weights", default="", help="default: the shipped ones")
    parser.add_argument("--save-dir", type=Path)
    values = parser.parse_args()
    if values.save_dir and values.save_dir.exists():
        parser.error(f"{values.save_dir} exists; windows of other weights may lie in it")
    pairs = nox.find_pairs(values.data)
    table = measure(pairs, nox.Inference(weights=values.weights))
    worst = table[table["error"] >= values.least]
    print(worst.round(2).to_string(index=False))
    print(f"{len(worst)} of {len(table)} pairs: {worst['kind'].value_counts().to_dict()}")
    if values.save_dir:
        save_windows(worst, pairs, values.save_dir, values.size)


if __name__ == "__main__":
    main()
