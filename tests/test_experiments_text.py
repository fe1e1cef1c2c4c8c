"""The texts that the experiments on language read."""

import gzip
import hashlib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_text_is_the_one_that_the_data_page_names():
    text = gzip.decompress((ROOT / "data" / "kjv" / "kjv.txt.gz").read_bytes())
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(text).hexdigest() in page
