"""Factorize the linear layers of a Llama-like language model into a folder that loads again.

    python examples/compress_llm.py [MODEL] --keep 0.8 --out FOLDER [--text FILE.txt]

MODEL is a folder that transformers reads, by default SmolLM2-135M-Instruct. Statistics come from
the first 80 % of the text, perplexities from the rest; without a text of your own, from WordNet,
the Bible and the Python documentation. The embedding table and the head stay as they are. A run
that was killed goes on where it stopped when the same command is given again. To load the result:

    from examples.compress_llm import load
    model, tokenizer = load("FOLDER")
"""

import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lrf_utils as lrf
import notebook_utils as nb
from experiments import smollm

# Not model.safetensors: from_pretrained would find dense layers' weights missing in there, fill
# them with random numbers, and only warn.
FACTORS = "factorized.safetensors"
CHUNK = 8  # batches after which statistics are saved


def load(folder: str | Path) -> tuple[nn.Module, Any]:
    """The factorized model and its tokenizer."""
    with torch.device("meta"):  # shapes without numbers
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model = lrf.load_factorized(model, Path(folder) / FACTORS)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_dense(model: str | None) -> tuple[nn.Module, Any]:
    if model is None:
        return nb.load_smollm2()
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    return dense, AutoTokenizer.from_pretrained(model)


def texts(tokenizer: Any, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Windows to calibrate with and windows to test with."""
    sizes = (options.windows, options.test_windows)
    if options.text is None:
        kinds = len(smollm.KINDS)
        parts = zip(("calibration", "test"), (max(1, size // kinds) for size in sizes))
        found = (smollm.windows_of(tokenizer, part, size, options.length) for part, size in parts)
        # One window of each kind after the other.
        first, second = (torch.stack(list(each.values()), 1).flatten(0, 1) for each in found)
        return first, second
    text = options.text.read_text(encoding="utf-8")
    end = len(text) * 8 // 10
    first = smollm.token_windows(tokenizer, text[:end], sizes[0], options.length)
    return first, smollm.token_windows(tokenizer, text[end:], sizes[1], options.length)


def write(path: Path, value: Any) -> None:
    """As a whole or not at all."""
    torch.save(value, path.with_suffix(".half"))
    os.replace(path.with_suffix(".half"), path)


def statistics(
    model: nn.Module, names: list[str], windows: Tensor, work: Path
) -> dict[str, lrf.Statistics]:
    """Of all windows; those of the first ones are in ``work``, if a run was interrupted."""
    path, batches = work / "statistics.pt", windows.split(2)
    done, known = 0, {}
    if path.exists():
        done, sums = torch.load(path, weights_only=True)
        known = {name: lrf.Statistics(**each) for name, each in sums.items()}
    for start in range(done, len(batches), CHUNK):
        print(f"statistics: batches {start + 1} to {min(start + CHUNK, len(batches))}", flush=True)
        more = lrf.collect_statistics(
            model,
            batches[start : start + CHUNK],
            names,
            loss="tokens",
            weighted=True,
            seed=start,
            progress=sys.stderr.isatty(),
        )
        # One layer after another leaves both dictionaries, so that memory holds no third one.
        known = {name: known.pop(name) + more.pop(name) for name in list(known)} or more
        write(path, (start + CHUNK, {name: vars(each) for name, each in known.items()}))
    return known


def compress(options: argparse.Namespace) -> None:
    model, tokenizer = load_dense(options.model)
    with warnings.catch_warnings(action="ignore"):  # of the tied head; said below
        names = [name for name in lrf.layer_names(model) if name != "lm_head"]
    total = sum(model.get_submodule(name).weight.numel() for name in names)
    left = lrf.count_parameters(model) - total
    print(f"{len(names)} linear layers with {total:,} weights; {left:,} in embeddings, head and")
    print("norms stay as they are")

    work = options.out / "unfinished"
    work.mkdir(parents=True, exist_ok=True)
    given, asked = json.dumps(vars(options), default=str), work / "options.json"
    if asked.exists() and asked.read_text() != given:
        sys.exit(f"{work} is from a run with other options; remove it or choose another --out")
    asked.write_text(given)

    calibration, test = texts(tokenizer, options)
    known = statistics(model, names, calibration, work)
    if not (work / "plan.pt").exists():
        print("errors at each rank of each layer", flush=True)
        with warnings.catch_warnings(action="ignore"):  # of what the budget does not count
            table = lrf.rank_options(model, known, multiple_of=options.multiple_of)
        write(work / "plan.pt", lrf.allocate_ranks(table, options.keep * total))
    plan = torch.load(work / "plan.pt", weights_only=True)
    print(f"factors of {sum(rank is not None for rank in plan.values())} layers", flush=True)
    small = lrf.factorize(model, plan, known)
    del known
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(options.out)
    lrf.save_factorized(small, options.out / FACTORS)

    print(f"perplexity of {len(test)} windows, before and after", flush=True)
    before = smollm.window_losses(model, test)
    after = smollm.window_losses(load(options.out)[0], test)
    ratio = nb.interval(100 * (after - before).double().expm1())
    print(f"parameters {lrf.count_parameters(model):,} -> {lrf.count_parameters(small):,}")
    print(f"perplexity {smollm.perplexity(before):.2f} -> {smollm.perplexity(after):.2f}")
    print(f"change of each window's perplexity: {ratio:+.1f} %")
    shutil.rmtree(work)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a folder; by default SmolLM2")
    parser.add_argument("--keep", type=float, default=0.8, help="share of the linear weights")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--text", type=Path, help="your own text, UTF-8")
    parser.add_argument("--windows", type=int, default=48, help="to calibrate with")
    parser.add_argument("--test-windows", type=int, default=18)
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--multiple-of", type=int, default=16, help="of which ranks are multiples")
    compress(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
