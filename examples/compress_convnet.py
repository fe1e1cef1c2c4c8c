"""Factorize the convolutions of a network of torchvision: fewer MACs, without labels or training.

    python examples/compress_convnet.py [resnet50] --keep 0.5 --images FOLDER --out FILE

BatchNorm is folded first, then 1×1 and 3×3 layers share one budget of MACs, by predicted loss,
and least squares fits the last part of each. The first images of FOLDER (and its subfolders)
calibrate, the last ones compare the predictions of both networks; without a folder, they are
noise. Pretrained weights are used if torchvision has downloaded them before, or if ``--weights``
names their file; otherwise weights are random, which shows time and memory only. To load the
result:

    from examples.compress_convnet import load
    model = load(FILE, "resnet50")
"""

import argparse
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torchvision.models as zoo
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

import lrf_convs
import lrf_utils as lrf
from experiments.models import residual_sums, split_options

SHARES = (0.06, 0.12, 0.18, 0.25, 0.33, 0.42, 0.5, 0.6, 0.75)  # of a full rank


class Folder(Dataset):
    """All images below a folder, as torchvision's classifiers read them."""

    def __init__(self, folder: Path, size: int) -> None:
        kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
        self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in kinds)
        crop = [v2.Resize(round(size / 0.875)), v2.CenterCrop(size), v2.ToImage()]
        scale = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.transform = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), scale])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(Image.open(self.files[i]).convert("RGB"))


class Noise(Dataset):
    """Smooth random images, the same ones each time."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        small = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        return F.interpolate(small, self.size, mode="bicubic")[0]


def dense(name: str, weights: str | None = None) -> tuple[nn.Module, str]:
    """The network without BatchNorm, and a word on its weights."""
    torch.manual_seed(0)
    model, published = zoo.get_model(name, weights=None).eval(), zoo.get_model_weights(name)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.DEFAULT.url).name
    file = Path(weights) if weights else cached
    if weights or cached.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return fuse(model), f"weights of {file.name}"
    return fuse(model), "random weights"


def load(file: str | Path, name: str) -> nn.Module:
    """The factorized network."""
    return lrf.load_factorized(dense(name)[0], file).eval()


def candidates(layer: nn.Conv2d) -> Iterator[tuple]:
    """Schemes and ranks: of 1×1 layers the truncated SVD, of others spatial and Tucker-2."""
    for scheme in ("out",) if layer.kernel_size == (1, 1) else ("spatial", "Tucker-2"):
        full = lrf_convs.full_rank(layer, scheme)
        for share in SHARES:
            if scheme == "Tucker-2":
                yield scheme, tuple(max(1, round(share * most)) for most in full)
            else:
                yield scheme, max(1, round(share * full))


def drawn_class(logits: Tensor) -> Iterator[Tensor]:
    """The cross-entropy at a class that the network's own prediction draws: one backward pass."""
    classes = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
    yield F.cross_entropy(logits, classes, reduction="sum")


@torch.no_grad()
def compared(model: nn.Module, small: nn.Module, batches: Iterable[Tensor]) -> tuple[float, float]:
    """The share of images with the same prediction, and the error of the logits by their size."""
    same, error, size, count = 0, 0.0, 0.0, 0
    for x in batches:
        ours, theirs = small(x), model(x)
        same, count = same + int((ours.argmax(1) == theirs.argmax(1)).sum()), count + len(x)
        error += (ours - theirs).square().sum().item()
        size += (theirs - theirs.mean(1, keepdim=True)).square().sum().item()
    return same / count, (error / size) ** 0.5


class Clock:
    """Prints what a step took, and the largest memory until then."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def __call__(self, step: str) -> None:
        now = time.perf_counter(), time.process_time()
        (seconds, cpu), self.start = (b - a for a, b in zip(self.start, now)), now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak /= 2**30 if sys.platform == "darwin" else 2**20
        spent = f"{seconds:.0f} s ({cpu:.0f} s of CPU time)"
        print(f"{step}: {spent}, at most {peak:.1f} GB so far", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs")
    parser.add_argument("--images", type=Path, help="a folder of images")
    parser.add_argument("--weights", help="a file of the network's state_dict")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--count", type=int, default=64, help="images to calibrate with")
    parser.add_argument("--test-count", type=int, default=32, help="images to compare with")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--positions", type=int, default=64, help="of each image, for the fit")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)  # the import of the lessons' code has set it to one
    needed, size = options.count + options.test_count, options.size
    images = Folder(options.images, size) if options.images else Noise(needed, size)
    if len(images) < needed:
        sys.exit(f"{options.images} holds {len(images)} images, fewer than {needed}")
    parts = range(options.count), range(len(images) - options.test_count, len(images))
    loader, test = (DataLoader(Subset(images, part), options.batch) for part in parts)
    model, said = dense(options.model, options.weights)
    model.requires_grad_(False)
    x, clock = images[0][None], Clock()
    total, size = lrf.count_macs(model, x), lrf.count_parameters(model)
    print(f"{options.model}, {said}: {total / 1e6:,.0f} million MACs, {size:,} parameters")

    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels > 3
    ]
    torch.manual_seed(0)
    statistics = lrf.collect_statistics(model, loader, names, loss=drawn_class)
    clock(f"statistics of {len(names)} layers")
    table = split_options(model, statistics, x, candidates)
    clock(f"{sum(len(each) for each in table.values())} options")
    fixed = total - sum(each[None][0] for each in table.values())
    plan = lrf.allocate_ranks(table, options.keep * total - fixed)
    plan = {name: option for name, option in plan.items() if option}
    del statistics
    layers = {name: model.get_submodule(name) for name in plan}
    split = {name: lrf_convs.split_conv(layers[name], *plan[name]) for name in plan}
    small = lrf.factorize(model, split)
    before = compared(model, small, test)
    clock(f"{len(plan)} layers factorized")
    how = {"sums": residual_sums(model), "positions": options.positions}
    small = lrf_convs.refit(model, small, loader, plan, **how)
    clock("least squares")
    lrf.save_factorized(small, options.out)
    for (same, error), step in zip((before, compared(model, small, test)), ("before", "after")):
        print(f"{step} least squares: {same:.1%} same predictions, logits off by {error:.1%}")
    macs, parameters = lrf.count_macs(small, x), lrf.count_parameters(small)
    print(f"{options.out}: {macs / total:.1%} of the MACs, {parameters / size:.1%} of the weights")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*left out.*")
    main()
