"""A network of handwritten digits in a file of 12 kB, read and run with NumPy alone.

    python examples/tiny_digit.py 7

7 is the number of a test image of MNIST. Or give "all", or a file with a drawing: 28 lines of 28
characters, where blanks and dots are paper.
"""

import gzip
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TINY, RAW = ROOT / "checkpoints" / "tiny.lrq", ROOT / "data" / "MNIST" / "raw"


def load(path=TINY):
    """The layers as (W, bias or None).

    A code c of b bits in a row of W stands for (c + ½ - 2^(b - 1)) times the step of that row.
    """
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    if data[:4] != b"LRQ1" or data[4:8] != struct.pack("<I", zlib.crc32(data[8:])):
        raise ValueError(
            f"{path} is missing or damaged; restore it: git checkout -- checkpoints/tiny.lrq"
        )
    bits, place, layers = data[8], 10 + 5 * data[9], []
    for m, n, biased in struct.iter_unpack("<HH?", data[10:place]):
        halves = np.frombuffer(data, "<f2", m * (1 + biased), place).astype("f4")
        halves = halves.reshape(-1, m)  # the steps, and the biases if there are any
        place += 2 * halves.size
        packed = np.frombuffer(data, "u1", -(-m * n * bits // 8), place)
        place += packed.size
        ones = np.unpackbits(packed, count=m * n * bits, bitorder="little").reshape(m, n, bits)
        levels = ones @ (1 << np.arange(bits)) + 0.5 - 2 ** (bits - 1)
        layers.append((levels * halves[0][:, None], halves[1] if biased else None))
    return layers


def classify(pixels, layers):
    """Probabilities of the ten digits for images (N, 784) with pixels from 0 to 1."""
    x = (pixels - 0.1307) / 0.3081
    for W, bias in layers:
        x = x @ W.T
        if bias is not None:  # without a bias it is the first factor of a pair
            x = x + bias if len(W) == 10 else np.maximum(x + bias, 0)  # no ReLU at the end
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def read(file, header):
    return np.frombuffer(gzip.decompress((RAW / file).read_bytes()), "u1")[header:]


def main(what):
    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784) / 255
    if what == "all":
        right = classify(images, load()).argmax(1) == read("t10k-labels-idx1-ubyte.gz", 8)
        return f"{100 * right.mean():.2f} % of {len(right):,} images right"
    lines = Path(what).read_text().splitlines() if Path(what).is_file() else []
    if [len(line) for line in lines] == [28] * 28:
        pixels = np.array([c not in ". " for line in lines for c in line], float)
    elif what.isdigit() and int(what) < len(images):
        pixels = images[int(what)]
    else:
        raise ValueError(
            "give a number from 0 to 9999, a file of 28 lines of 28 characters, or all; "
            f"got {what!r}"
        )
    for row in pixels.reshape(28, 28):
        print("".join(" .:+#"[min(int(5 * value), 4)] for value in row))
    p = classify(pixels[None], load())[0]
    return f"This is a {p.argmax()} ({100 * p.max():.1f} %)."


if __name__ == "__main__":
    try:
        print(main(" ".join(sys.argv[1:])))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
