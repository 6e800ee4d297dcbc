"""Half a digit, completed: an autoregressive model knows p(rest | what is given), and its samples are that.

    python examples/completion.py --recipe pixelcnn++ --out completion.png

Each row of the picture: a digit that the model has not seen, its upper half, and completions by different seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import torch

from pygen.autoregressive import AutoregressiveModel
from pygen.workbench.classifier import accuracy, train_classifier
from pygen.workbench.data import load_data
from pygen.workbench.families import FAMILIES
from pygen.workbench.figures import sheet_png
from pygen.workbench.recipes import train_family, training_for
from pygen.workbench.training import TrainingConfig

COMPLETIONS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(FAMILIES["autoregressive"]), default="gated-pixelcnn")
    parser.add_argument("--steps", type=int, help="of training; by default the recipe's own")
    parser.add_argument("--out", type=Path, default=Path("completion.png"))
    options = parser.parse_args()

    train, test = load_data("digits").split()
    training: TrainingConfig = training_for("autoregressive", options.recipe)
    if options.steps is not None:
        training = TrainingConfig(steps=options.steps, batch_size=16)
    trained = train_family("autoregressive", train, recipe=options.recipe, training=training, progress=False)
    model = cast(AutoregressiveModel, trained.ema).eval()

    assert test.labels is not None
    shown = torch.stack([torch.nonzero(test.labels == digit)[0, 0] for digit in range(10)])
    x, labels = test.values(shown), test.labels[shown]
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    half = x.masked_fill(~known, 0.0)
    # Completion number k of digit i is sample number 8 i + k: the same in any batch.
    rows = torch.arange(10).repeat_interleave(COMPLETIONS)
    completed = model.complete(half[rows], known, condition=labels[rows], ids=torch.arange(len(rows)))
    assert torch.equal(completed[..., :4, :], x[rows][..., :4, :])
    judge = train_classifier(train.values(), train.labels, 10)
    print(
        f"{options.recipe}: {accuracy(judge, completed, labels[rows]):.1%} of {len(rows)} completions read as the digit"
    )
    by_digit = completed.unflatten(0, (10, COMPLETIONS))
    sheet = torch.cat((x[:, None], half[:, None], by_digit), dim=1).flatten(0, 1)
    options.out.write_bytes(sheet_png(sheet, 2 + COMPLETIONS, ink=True))
    print(f"{options.out}: digits, their upper halves, and {COMPLETIONS} completions of each")


if __name__ == "__main__":
    main()
