"""Make data/wordnet.tsv.gz, the sentences of lesson 10, from the files of Debian's packages wordnet-base and bible.

    python scripts/write_wordnet.py WORDNET_FOLDER KJV_FILE

WORDNET_FOLDER holds data.noun, data.verb, data.adj and data.adv. KJV_FILE is the output of Debian's ``bible -f
Gen1:1-Rev22:21``, one verse a line. No text occurs twice, and the parts share no synset:

- test, 2,000, and validation, 500: an example sentence, and the definition of the noun that it is an example of;
- calibration 0 to 2, 1,000 each, and training, 14,000: one definition or example of a synset;
- other, 200: verses of the King James Bible, which are unlike WordNet.
"""

import gzip
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"calibration 0": 1000, "calibration 1": 1000, "calibration 2": 1000, "training": 14_000}


def words(text: str) -> int:
    return len(text.split())


def main(wordnet: Path, kjv: Path) -> None:
    generator = random.Random(0)
    pairs, texts, seen = [], [], set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{part}").read_text("utf-8").splitlines():
            gloss = line.partition(" | ")[2]
            definition = gloss.partition('"')[0].strip(" ;:")
            example = next((e.strip() for e in re.findall(r'"([^"]+)"', gloss) if words(e) >= 4), "")
            if not gloss.isascii() or words(definition) < 3 or seen & {definition, example}:
                continue
            seen |= {definition, example} - {""}
            if part == "noun" and 6 <= words(example) <= 14 and 5 <= words(definition) <= 14:
                pairs.append((example, definition))
            elif words(text := generator.choice([example or definition, definition])) <= 20:
                texts.append(text)
    generator.shuffle(pairs)
    rows = [("test", *pair) for pair in pairs[:2000]] + [("validation", *pair) for pair in pairs[2000:2500]]
    generator.shuffle(texts)
    for part, size in SIZES.items():
        rows += [(part, text, "") for text in texts[:size]]
        del texts[:size]
    verses = [re.sub(r"^\S+ ", "", line.strip()) for line in kjv.read_text("utf-8").splitlines()]
    verses = [verse for verse in verses if 10 <= words(verse) <= 30]
    rows += [("other", verse, "") for verse in generator.sample(verses, 200)]
    text = "".join("\t".join(row) + "\n" for row in [("part", "text", "definition"), *rows])
    # Without the time of writing in it, so that the same input makes the same file.
    (ROOT / "data" / "wordnet.tsv.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(pairs)} pairs, {len(rows)} rows, {len(texts)} texts left")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
