"""A network of handwritten digits in one file of 12 kB, read and run with NumPy alone: python scripts/tiny_digit.py 7

7 is the number of a test image of MNIST. Or give "all", or a file of 28 lines of 28 characters, blanks and dots paper.
"""

import gzip
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

TINY, RAW = (Path(__file__).resolve().parents[1] / path for path in ("checkpoints/tiny.lrq", "data/MNIST/raw"))


def load(path=TINY):
    """The layers as (W, bias or None). A code c of a row stands for (c + ½ - 2^(bits - 1)) times the row's step."""
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    if data[:4] != b"LRQ1" or data[4:8] != struct.pack("<I", zlib.crc32(data[8:])):
        raise ValueError(f"{path} is missing or damaged; restore it: git checkout -- checkpoints/tiny.lrq")
    bits, place, layers = data[8], 10 + 5 * data[9], []
    for m, n, biased in struct.iter_unpack("<HH?", data[10:place]):
        halves = np.frombuffer(data, "<f2", m * (1 + biased), place).astype("f4").reshape(-1, m)  # steps, biases
        packed = np.frombuffer(data, "u1", -(-m * n * bits // 8), place + 2 * halves.size)
        ones = np.unpackbits(packed, count=m * n * bits, bitorder="little").reshape(m, n, bits)
        levels = ones @ (1 << np.arange(bits)) + 0.5 - 2 ** (bits - 1)
        layers.append((levels * halves[0][:, None], halves[1] if biased else None))
        place += 2 * halves.size + packed.size
    return layers


def classify(pixels, layers):
    """Probabilities of the ten digits for images (N, 784) with pixels from 0 to 1."""
    x = (pixels - 0.1307) / 0.3081
    for W, bias in layers:
        x = x @ W.T if bias is None else np.maximum(x @ W.T + bias, 0 if len(W) > 10 else -np.inf)  # no ReLU at the end
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def main(what):
    read = [np.frombuffer(gzip.decompress(p.read_bytes()), "u1") for p in sorted(RAW.glob("t10k-*.gz"))]
    images, labels = read[0][16:].reshape(-1, 784) / 255, read[1][8:]
    if what == "all":
        return f"{100 * (classify(images, load()).argmax(1) == labels).mean():.2f} % of {len(labels):,} images right"
    lines = Path(what).read_text().splitlines() if Path(what).is_file() else []
    if not (what.isdigit() and int(what) < len(images)) and [len(line) for line in lines] != [28] * 28:
        raise ValueError(f"give a number from 0 to 9999, a file of 28 lines of 28 characters, or all; got {what!r}")
    pixels = np.array([c not in ". " for line in lines for c in line], float) if lines else images[int(what)]
    print(*("".join(" .:+#"[min(int(5 * v), 4)] for v in row) for row in pixels.reshape(28, 28)), sep="\n")
    p = classify(pixels[None], load())[0]
    return f"This is a {p.argmax()} ({100 * p.max():.1f} %)."


if __name__ == "__main__":
    try:
        print(main(" ".join(sys.argv[1:])))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
