"""Density estimation on tabular data, and what it is for: a score that says how unusual a row is.

A neural spline flow (Durkan et al. 2019, arXiv:1906.04032) learns p(x) of healthy rows alone; -log p(x) of a new row is
its anomaly score. The data are 569 cell samples with 30 measurements (Breast Cancer Wisconsin, in scikit-learn): the
flow sees half of the benign ones. It is asked to find the malignant ones, many of which lie far out, and then rows in
which each measurement is of another benign cell: nothing in them is out of range, and only a density of all
measurements together can tell.

    python examples/tabular.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pygen.flows import Flow
from pygen.flows.neural_spline import neural_spline_flow


def cells() -> tuple[Tensor, Tensor, Tensor]:
    """Benign rows to learn from, then the rows to judge and whether each is malignant. Logarithms of the measurements,
    in units of the training rows' mean and deviation."""
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32).clamp_min(1e-4).log()
    malignant = torch.tensor(data.target) == 0
    benign = x[~malignant][torch.randperm(int((~malignant).sum()), generator=torch.Generator().manual_seed(0))]
    training, unseen = benign.tensor_split(2)
    mean, deviation = training.mean(0), training.std(0)
    rows = torch.cat((unseen, x[malignant]))
    labels = torch.cat((torch.zeros(len(unseen)), torch.ones(int(malignant.sum()))))
    return (training - mean) / deviation, (rows - mean) / deviation, labels


def train(flow: Flow, x: Tensor, *, steps: int, batch: int = 64) -> list[float]:
    """Maximum likelihood with a little noise on the rows, which keeps 178 of them from being learned by heart."""
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses = []
    for _ in range(steps):
        rows = x[torch.randint(len(x), (batch,))]
        loss = -flow.log_prob(rows + 0.1 * torch.randn_like(rows)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()

    torch.manual_seed(0)
    training, rows, malignant = cells()
    flow = neural_spline_flow(training.shape[1], layers=4, hidden=64)
    train(flow, training, steps=options.steps)
    flow.eval()
    benign = rows[malignant == 0]
    mixed = torch.stack([column[torch.randperm(len(benign))] for column in benign.T], 1)
    gaussian = EmpiricalCovariance().fit(training.numpy())
    forest = IsolationForest(random_state=0).fit(training.numpy())
    scores: dict[str, Callable[[Tensor], Any]] = {
        "neural spline flow, -log p(x)": lambda x: -flow.log_prob(x).numpy(),
        "Gaussian, Mahalanobis distance": lambda x: gaussian.mahalanobis(x.numpy()),
        "isolation forest": lambda x: -forest.score_samples(x.numpy()),
    }
    print("area under the ROC curve, unseen benign rows against   malignant   mixed")
    with torch.no_grad():
        for name, score in scores.items():
            areas = [area(score(benign), score(others)) for others in (rows[malignant == 1], mixed)]
            print(f"  {name:32} " + " " * 18 + "   ".join(f"{value:9.3f}" for value in areas))


def area(usual: Any, unusual: Any) -> float:
    """How often an unusual row has a higher score than a usual one."""
    return float(roc_auc_score([0] * len(usual) + [1] * len(unusual), [*usual, *unusual]))


if __name__ == "__main__":
    main()
