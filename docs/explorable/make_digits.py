"""Writes digits.js: the first 1,000 of scikit-learn's 8x8 digits, 800 of them to train on.

The data set: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI
Machine Learning Repository, CC BY 4.0.
"""

import json
from pathlib import Path

from sklearn.datasets import load_digits

COUNT, TRAINING = 1000, 800
LIMIT = 70_000  # bytes: the page must stay small


def main() -> None:
    digits = load_digits()
    pixels = digits.data[:COUNT].astype(int).ravel()  # 0 to 16
    images = "".join(chr(ord("a") + pixel) for pixel in pixels)
    labels = "".join(map(str, digits.target[:COUNT]))
    data = {"images": images, "labels": labels, "training": TRAINING}
    text = (
        "// Made by make_digits.py. E. Alpaydin and C. Kaynak, Optical Recognition of\n"
        "// Handwritten Digits, UCI Machine Learning Repository, CC BY 4.0.\n"
        f"const DIGITS = {json.dumps(data, indent=1)};\n"
    )
    assert len(text) < LIMIT, len(text)
    Path(__file__).with_name("digits.js").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
