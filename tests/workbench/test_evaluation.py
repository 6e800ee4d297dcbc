"""The judge and the evaluation, on a model whose density and samples are known: independent pixels, counted."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from pygen import ops
from pygen.model import Density, GenerativeModel, ModelConfig, Stage, refuse_steps
from pygen.workbench.classifier import Classifier, accuracy, train_classifier
from pygen.workbench.data import Dataset, load_data
from pygen.workbench.evaluation import (
    Judge,
    bits_kind,
    bits_per_dim,
    check_fit,
    draw,
    evaluate,
    quality_with_steps,
    spread,
)
from pygen.workbench.families import FAMILIES, model_class

pytest.importorskip("sklearn")


class PixelCounts(GenerativeModel):
    """Independent pixels given the class: p(x_i = k | y) as counted in the data, plus one."""

    density = Density.EXACT

    def __init__(self, data: Dataset) -> None:
        super().__init__(ModelConfig(shape=data.shape, levels=data.levels, classes=data.classes))
        assert data.labels is not None
        assert data.classes is not None
        flat = data.pictures.flatten(1).long()
        counts = torch.ones(data.classes, flat.shape[1], data.levels, dtype=torch.float64)
        for label in range(data.classes):
            counts[label] += torch.nn.functional.one_hot(flat[data.labels == label], data.levels).sum(0)
        self.log_p = torch.nn.Parameter((counts / counts.sum(2, keepdim=True)).log(), requires_grad=False)

    def sample(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> Tensor:
        refuse_steps(self, steps)
        ids = self.resolve_ids(n, ids)
        condition = self.resolve_condition(ids, condition)
        u = ops.uniform(ids, (self.config.dimensions,), seed=seed).double()
        k = (self.log_p[condition].exp().cumsum(2) < u[:, :, None]).sum(2).clamp(max=self.config.levels - 1)
        return self.dequantize(k).unflatten(1, self.config.shape)

    def log_prob(
        self, x: Tensor, *, condition: Tensor | None = None, ids: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        condition = self.check_condition(condition, len(x))
        k = self.quantize(x).flatten(1)
        return self.log_p[condition].gather(2, k[:, :, None]).sum((1, 2))

    def trajectory(
        self,
        n: int,
        *,
        ids: Tensor | None = None,
        condition: Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> list[Stage]:
        return [Stage("X", self.sample(n, ids=ids, condition=condition, seed=seed, steps=steps))]

    def network_passes(self, steps: int | None = None) -> int:
        return 1

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        return -self.log_prob(x, condition=condition).mean()


@pytest.fixture(scope="module")
def digits() -> tuple[Dataset, Dataset]:
    return load_data("digits").split()


@pytest.fixture(scope="module")
def judge(digits: tuple[Dataset, Dataset]) -> Judge:
    return Judge(*digits, seed=0)


def test_classifier_reads_held_out_digits_and_repeats_by_seed(digits: tuple[Dataset, Dataset], judge: Judge) -> None:
    train, test = digits
    assert judge.accuracy is not None
    assert judge.accuracy >= 0.95
    features, _ = judge.classifier.read(judge.test)
    assert features.shape == (len(test), 32)
    state = torch.random.get_rng_state()
    again = train_classifier(train.values(), train.labels, train.classes, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again.read(judge.test)[0], features)


def test_classifier_without_labels_learns_quarter_turns(digits: tuple[Dataset, Dataset]) -> None:
    train, test = digits
    classifier = train_classifier(train.values(), None, None, seed=1, steps=200)
    assert classifier.classes == 4
    assert accuracy(classifier, test.values().rot90(1, (-2, -1)), torch.ones(len(test), dtype=torch.int64)) > 0.9
    wide = torch.rand(40, 3, 9, 20)
    assert train_classifier(wide, None, None, steps=2).classes == 2


def test_classifier_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_features is 33, but expected 1 .. 32"):
        Classifier((1, 8, 8), 10, num_features=33)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), but expected \(4,\)"):
        train_classifier(torch.zeros(4, 1, 8, 8), torch.zeros(3, dtype=torch.int64), 2)


def test_real_pictures_win_noise_loses_and_a_weak_model_lies_between(
    digits: tuple[Dataset, Dataset], judge: Judge
) -> None:
    real, noise = judge.score(judge.real, judge.labels), judge.score(judge.noise())
    result, samples = evaluate(PixelCounts(digits[0]), judge)
    assert samples.shape == judge.real.shape
    assert real.frechet < 2 < result.frechet < noise.frechet
    assert real.precision > result.precision > noise.precision
    assert real.recall > 0.8 > noise.recall
    assert real.coverage == 1 > noise.coverage
    assert real.agreement is not None
    assert result.agreement is not None
    assert real.agreement > result.agreement > 0.5
    assert (result.density, result.network_passes, result.parameters) == ("exact", 1, 10 * 64 * 17)
    assert result.sample_seconds > 0


def test_bits_per_dim_of_a_known_density(digits: tuple[Dataset, Dataset]) -> None:
    train, test = digits
    model = PixelCounts(train)
    model.log_p.fill_(-math.log(17))
    bits = bits_per_dim(model, test.values(), test.labels)
    assert bits is not None
    assert bits == pytest.approx((math.log2(17), 0), abs=1e-9)
    model = PixelCounts(train)
    found = bits_per_dim(model, test.values(), test.labels)
    nats = model.log_prob(test.values(), condition=test.labels)
    assert found is not None
    assert found[0] == pytest.approx(-float(nats.mean()) / 64 / math.log(2))
    assert found[1] == pytest.approx(float(nats.std()) / 64 / math.log(2) / len(test) ** 0.5)
    model.density = Density.IMPLICIT  # type: ignore[misc]
    assert bits_per_dim(model, test.values(), test.labels) is None


def test_samples_do_not_depend_on_the_batch_and_repeat_by_seed(digits: tuple[Dataset, Dataset]) -> None:
    model = PixelCounts(digits[0])
    labels = torch.arange(1200) % 10
    whole = draw(model, torch.arange(1200), labels, seed=3)
    part = torch.tensor([7, 600, 1199])
    assert torch.equal(draw(model, part, labels[part], seed=3), whole[part])
    assert not torch.equal(draw(model, part, labels[part], seed=4), whole[part])


def test_steps_of_a_family_that_has_none_are_refused(digits: tuple[Dataset, Dataset], judge: Judge) -> None:
    with pytest.raises(ValueError, match="steps is 4, but PixelCounts always takes 1 passes"):
        quality_with_steps(PixelCounts(digits[0]), judge, 4)


def test_a_model_of_other_pictures_is_refused(digits: tuple[Dataset, Dataset], judge: Judge) -> None:
    model = PixelCounts(digits[0])
    model.config = ModelConfig(shape=(3, 32, 32), levels=256)
    with pytest.raises(ValueError, match=r"pictures of shape \(3, 32, 32\) with 256 grey values, but digits has shape"):
        evaluate(model, judge)


def test_a_model_of_other_classes_is_refused(digits: tuple[Dataset, Dataset]) -> None:
    train, _ = digits
    model = PixelCounts(train)
    check_fit(model, train, train.class_names)
    with pytest.raises(ValueError, match="trained with 10 classes, but digits has none"):
        check_fit(model, dataclasses.replace(train, labels=None, classes=None, class_names=()))
    with pytest.raises(ValueError, match="class 9 as 'nine', but in digits that is '9'"):
        check_fit(model, train, (*train.class_names[:9], "nine"))
    model.config = dataclasses.replace(model.config, classes=None)
    check_fit(model, train)


def test_bits_are_exact_only_for_discrete_pictures(digits: tuple[Dataset, Dataset]) -> None:
    model = PixelCounts(digits[0])
    assert bits_kind(model) == "exact"
    model.discrete = False  # type: ignore[misc]
    assert bits_kind(model) == "bound"
    kinds = {name: (model_class(name).density.value, model_class(name).discrete) for name in FAMILIES}
    assert kinds["flow"] == ("exact", False)
    assert kinds["autoregressive"] == ("exact", True)


def test_data_that_are_too_few_or_all_alike_are_named(digits: tuple[Dataset, Dataset]) -> None:
    few = dataclasses.replace(digits[0], pictures=digits[0].pictures[:10], labels=None, classes=None, class_names=())
    with pytest.raises(ValueError, match="digits has 10 pictures, 2 of them held out, but at least 18 are needed, 4"):
        Judge(*few.split())
    # As few as are needed, and without labels no class is covered.
    least = dataclasses.replace(few, pictures=digits[0].pictures[:18])
    judge = Judge(*least.split())
    quality = judge.score(judge.real)
    assert quality.coverage is None
    assert math.isfinite(quality.frechet)
    with pytest.raises(ValueError, match="held-out pictures of digits are all alike"):
        Judge(*dataclasses.replace(least, pictures=least.pictures[:1].repeat(18, 1, 1, 1)).split())


def test_spread_keeps_proportions_of_sorted_rows() -> None:
    assert torch.equal(spread(5, 9), torch.arange(5))
    chosen = spread(1000, 100)
    assert len(chosen.unique()) == 100
    assert int((chosen < 500).sum()) == 50
