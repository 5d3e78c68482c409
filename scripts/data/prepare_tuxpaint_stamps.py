"""
Writes the stamps of Tux Paint, small images with a caption each, as JSONL files that `sparse-moe-vlm train` reads.

    apt-get install tuxpaint-stamps-default
    python scripts/data/prepare_tuxpaint_stamps.py --output outputs/tuxpaint_stamps

The stamps (GPL-2, https://tuxpaint.org) are read from where the Debian package is installed or unpacked. Smaller copies
of the images, on a white background, are written to the output folder. All images with the same caption are in the same
split. Stamps that exist only as SVG are left out.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageOps

INSTALLED = Path("/usr/share/tuxpaint/stamps")


def find_stamps(folder: Path) -> dict[Path, str]:
    """Returns the English caption of every PNG file by path: the first line of its text file."""
    stamps = {}
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").partition("\n")[0].strip() if text.exists() else ""
        if caption:
            stamps[path] = caption
    return stamps


def held_out_captions(captions: list[str], share: float = 0.1, seed: int = 0) -> set[str]:
    """Returns a random share of the different captions. Captions that differ only in case are not separated."""
    different = sorted({caption.lower() for caption in captions})
    chosen = set(random.Random(seed).sample(different, round(share * len(different))))
    return {caption for caption in captions if caption.lower() in chosen}


def write_image(source: Path, target: Path, size: int) -> None:
    """Writes an image that fits into a square of white pixels with this side."""
    image = Image.open(source).convert("RGBA")
    fitted = ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2), fitted)
    target.parent.mkdir(parents=True, exist_ok=True)
    square.save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=INSTALLED, help=f"folder of the stamps (default: {INSTALLED})")
    parser.add_argument("--output", type=Path, default=Path("outputs/tuxpaint_stamps"), help="folder for the files")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (default: 128)")
    arguments = parser.parse_args()
    stamps = find_stamps(arguments.stamps)
    if not stamps:
        parser.error(f"{arguments.stamps} contains no stamps: install tuxpaint-stamps-default, or pass --stamps")
    held_out = held_out_captions(list(stamps.values()))
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for path, caption in stamps.items():
        name = Path("images") / path.relative_to(arguments.stamps)
        write_image(path, arguments.output / name, arguments.size)
        rows["test" if caption in held_out else "train"].append({"image": str(name), "caption": caption})
    for split, of_split in rows.items():
        lines = [f"{json.dumps(row, ensure_ascii=False)}\n" for row in of_split]
        (arguments.output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{arguments.output / split}.jsonl: {len(of_split)} rows")


if __name__ == "__main__":
    main()
