"""Lesson 10's sentences: makes data/wordnet.tsv.gz from Debian's packages wordnet-base and bible.

    python -m experiments.wordnet WORDNET_FOLDER KJV_FILE

WORDNET_FOLDER holds data.noun, data.verb, data.adj and data.adv. KJV_FILE is the output of
Debian's ``bible -f Gen1:1-Rev22:21``, one verse a line. No text occurs twice, and the parts share
no synset:

- test, 2,000, and validation, 500: an example sentence, and the definition of its noun;
- calibration 0 to 2, 1,000 each, and training, 14,000: one definition or example of a synset;
- other, 200: verses of the King James Bible, which are unlike WordNet.
"""

import gzip
import random
import re
import sys
from pathlib import Path

from experiments.common import ROOT

SIZES = {"calibration 0": 1000, "calibration 1": 1000, "calibration 2": 1000, "training": 14_000}


def words(text: str) -> int:
    return len(text.split())


def read_wordnet(
    folder: Path, generator: random.Random
) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of an example and the definition of its noun; and single texts of other synsets."""
    pairs, texts, seen = [], [], set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines():
            gloss = line.partition(" | ")[2]
            definition = gloss.partition('"')[0].strip(" ;:")
            examples = [text.strip() for text in re.findall(r'"([^"]+)"', gloss)]
            example = next((text for text in examples if words(text) >= 4), "")
            if not gloss.isascii() or words(definition) < 3 or seen & {definition, example}:
                continue
            seen |= {definition, example} - {""}
            if part == "noun" and 6 <= words(example) <= 14 and 5 <= words(definition) <= 14:
                pairs.append((example, definition))
                continue
            text = generator.choice([example or definition, definition])
            if words(text) <= 20:
                texts.append(text)
    return pairs, texts


def read_verses(path: Path) -> list[str]:
    """The verses of 10 to 30 words, without the name of the place in front."""
    lines = path.read_text("utf-8").splitlines()
    verses = [re.sub(r"^\S+ ", "", line.strip()) for line in lines]
    return [verse for verse in verses if 10 <= words(verse) <= 30]


def main(wordnet: Path, kjv: Path, out: Path = ROOT / "data" / "wordnet.tsv.gz") -> None:
    generator = random.Random(0)
    pairs, texts = read_wordnet(wordnet, generator)
    generator.shuffle(pairs)
    rows = [("part", "text", "definition")]
    rows += [("test", *pair) for pair in pairs[:2000]]
    rows += [("validation", *pair) for pair in pairs[2000:2500]]
    generator.shuffle(texts)
    for part, size in SIZES.items():
        rows += [(part, text, "") for text in texts[:size]]
        del texts[:size]
    rows += [("other", verse, "") for verse in generator.sample(read_verses(kjv), 200)]
    text = "".join("\t".join(row) + "\n" for row in rows)
    # mtime: without the time of writing in it, the same input makes the same file
    out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(pairs)} pairs, {len(rows) - 1} rows, {len(texts)} texts left")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
