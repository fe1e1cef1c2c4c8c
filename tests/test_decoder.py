"""The decoder of notebook 09: its cache, its text, and what it says about bad input."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.train_decoder import Decoder, encode, load_text

ROOT = Path(__file__).resolve().parent.parent


def test_cached_and_uncached_logits_agree():
    torch.manual_seed(0)
    model, tokens = Decoder(width=16, heads=2, layers=2).eval(), torch.randint(63, (3, 12))
    caches = [[] for _ in model.blocks]
    with torch.no_grad():
        parts = [model(part, caches) for part in tokens.split([5, 1, 4, 2], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-5)
    assert all(cache[0].shape == (3, 12, 32) for cache in caches)


def test_context_is_not_exceeded():
    with pytest.raises(ValueError, match=re.escape("0 + 257 tokens, but the context is 256")):
        Decoder(width=8, heads=2, layers=1)(torch.zeros(1, 257).long())


def test_text_is_the_one_that_the_data_page_names():
    text = load_text()
    whole = "".join(text.alphabet[i] for i in torch.cat(text[1:]).tolist())
    assert hashlib.sha256(whole.encode()).hexdigest() in (ROOT / "data" / "README.md").read_text(encoding="utf-8")


def test_bad_input_ends_in_one_clear_line(tmp_path):
    (tmp_path / "kjv.txt.gz").write_bytes(b"no archive")
    for path in (tmp_path / "kjv.txt.gz", tmp_path / "none.gz"):
        with pytest.raises(OSError, match=r"missing or damaged .* git checkout"):
            load_text(path)
    with pytest.raises(ValueError, match=r"the decoder does not know \['é'\]"):
        encode("é", "abc")
    script = [sys.executable, ROOT / "scripts" / "train_decoder.py", "--steps", "10"]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode and result.stderr.splitlines() == [
        "--steps must be more than 100, the steps of the warm-up; got 10"
    ]
