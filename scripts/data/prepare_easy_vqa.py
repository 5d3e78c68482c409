"""
Writes the easy-VQA data set as JSONL files that `sparse-moe-vlm train` reads.

    pip install easy-vqa==1.0
    python scripts/data/prepare_easy_vqa.py --output outputs/easy_vqa

The package `easy-vqa` (MIT licence, https://github.com/vzhou842/easy-VQA) contains 5,000 images of one shape and 48,248
questions about them. The rows name the images where the package is installed. `train_what.jsonl` has the training
questions that ask for a shape or a color, without those to be answered with yes or no.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path


def rows_of(data: Path, split: str) -> list[dict[str, str]]:
    """Returns the rows of `"train"` or `"test"`, with `image`, `question` and `answer`."""
    folder = data / split
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [
        {"image": str(folder / f"images/{image}.png"), "question": question, "answer": answer}
        for question, answer, image in questions
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/easy_vqa"), help="folder for the files")
    arguments = parser.parse_args()
    package = importlib.util.find_spec("easy_vqa")
    if package is None or package.origin is None:
        parser.error("the package is not installed: run `pip install easy-vqa==1.0`")
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = Path(package.origin).parent / "data"
    train, test = rows_of(data, "train"), rows_of(data, "test")
    what = [row for row in train if row["answer"] not in ("yes", "no")]
    for name, rows in (("train", train), ("train_what", what), ("test", test)):
        path = arguments.output / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
