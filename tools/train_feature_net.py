"""Train a small classifier whose features the embedded metrics use, and write it to the metrics plugin.

python tools/train_feature_net.py digits
python tools/train_feature_net.py cifar10 --root cifar10-jpeg.tar.xz
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from o2mkd_bench.core.fingerprint import file_sha256
from o2mkd_plugins.datasets.cifar10 import Cifar10
from o2mkd_plugins.datasets.digits import Digits
from o2mkd_plugins.datasets.options import Cifar10Options, DigitsOptions
from o2mkd_plugins.metrics.networks import NETWORKS, Classifier, normalise
from o2mkd_plugins.metrics.options import WEIGHTS

BATCH = {"digits": 64, "cifar10": 256}
EPOCHS = {"digits": 60, "cifar10": 14}
RATE = {"digits": 0.01, "cifar10": 0.01}


def augment(images: Tensor, flip: bool, shift: int) -> Tensor:
    """Random translations by up to ``shift`` pixels, each image its own, and mirror images."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (shift,) * 4, mode="constant", value=-1.0)
    moves = torch.randint(0, 2 * shift + 1, (2, n))
    rows = (moves[0][:, None] + torch.arange(height))[:, None, :, None]
    columns = (moves[1][:, None] + torch.arange(width))[:, None, None, :]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    moved = padded[torch.arange(n)[:, None, None, None], channels, rows, columns]
    if not flip:
        return moved
    mirrored = torch.rand(n)[:, None, None, None] < 0.5
    return torch.where(mirrored, moved.flip(-1), moved)


def train(net: Classifier, images: Tensor, labels: Tensor, dataset: str, flip: bool) -> None:
    """AdamW on a one-cycle learning rate, label smoothing 0.1, bf16 autocast for the CIFAR network."""
    batch, epochs = BATCH[dataset], EPOCHS[dataset]
    steps = len(images) // batch
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE[dataset], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE[dataset], total_steps=epochs * steps, pct_start=0.25)
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: steps * batch].view(steps, batch)
        total = 0.0
        for chosen in order:
            x = augment(normalise(images[chosen]), flip, 4 if dataset == "cifar10" else 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=dataset == "cifar10"):
                logits = net(x.to(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.4f}", flush=True)


@torch.no_grad()
def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    hits = sum(
        int((net(normalise(x)).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(images)


def record(dataset: str, root: str | None, source: Any, weights: Path, reached: float) -> dict[str, Any]:
    """What must be known to judge the network, or to train it again."""
    info = source.info()
    arguments = [dataset, *(["--root", Path(root).name] if root else [])]
    _, channels, size = NETWORKS[dataset]
    return {
        "dataset": dataset,
        "sha256": file_sha256(weights),
        "width": NETWORKS[dataset][0]().head.in_features,
        "channels": channels,
        "size": size,
        "test_accuracy": round(reached, 4),
        "data": {"source": info.source, "fingerprint": info.fingerprint},
        "command": shlex.join(["python", "tools/train_feature_net.py", *arguments]),
        "epochs": EPOCHS[dataset],
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__.partition("+")[0],
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(NETWORKS))
    parser.add_argument("--root", help="where CIFAR-10 is; downloaded without")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the weights and their record")
    chosen = parser.parse_args(arguments)
    source = (
        Digits(DigitsOptions(), Path())
        if chosen.dataset == "digits"
        else Cifar10(Cifar10Options(root=chosen.root), Path())
    )
    images, labels = source.labelled()
    torch.manual_seed(0)
    net = NETWORKS[chosen.dataset][0]().to(memory_format=torch.channels_last)
    train(net, torch.from_numpy(images.train), torch.from_numpy(labels["train"]), chosen.dataset, source.info().flip)

    chosen.out.mkdir(parents=True, exist_ok=True)
    weights = chosen.out / f"{chosen.dataset}.safetensors"
    halves = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(halves, weights)
    net.load_state_dict(halves)  # the accuracy of what is written, not of what was trained
    reached = accuracy(net.eval(), torch.from_numpy(images.test), torch.from_numpy(labels["test"]))
    facts = record(chosen.dataset, chosen.root, source, weights, reached)
    weights.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
