"""The figures and how sure they are: by hand, by published values, or by how often they are right.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

import advanced_techniques as at


def answers(predicted: list[int], classes: int = 4, confidence: float = 0.7) -> torch.Tensor:
    """Probabilities [n, classes] of which the predicted ones are the largest."""
    rest = (1 - confidence) / (classes - 1)
    table = torch.full((len(predicted), classes), rest)
    return table.scatter(1, torch.tensor(predicted)[:, None], confidence)


def answers_right(right: list[bool], labels: torch.Tensor, confidence: float = 0.7) -> torch.Tensor:
    """Probabilities that name the label where `right` says so, else the next class."""
    predicted = torch.where(torch.tensor(right), labels, (labels + 1) % 4)
    return answers(predicted.tolist(), 4, confidence)


def data_with(validation: torch.Tensor, test: torch.Tensor, classes: str = "abcd") -> at.Data:
    """Data whose validation and test images have these labels."""
    cuts = torch.arange(len(validation) + len(test)).split([len(validation), len(test)])
    return at.Data("", list(classes), torch.zeros(0), torch.cat([validation, test]),
                   dict(zip(("validation", "test"), cuts, strict=True)))


LABELS = torch.arange(100) % 4


def test_one_hopeless_image_does_not_make_the_loss_infinite():
    loss, accuracy = at.score(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([1, 0]))
    assert loss == pytest.approx((-math.log(1e-12) - math.log(0.5)) / 2) and accuracy == 0.5


@pytest.mark.parametrize(("share", "count", "wanted"), [
    (0.5, 10, [0.2366, 0.7634]), (0.0, 10, [0.0, 0.2775]), (1.0, 10, [0.7225, 1.0]),
    (81 / 263, 263, [0.2553, 0.3662])])  # the last: Newcombe, 1998, table I
def test_wilson_intervals_are_the_published_ones(share, count, wanted):
    assert at.wilson_interval(share, count) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("share", [0, 30, 70, 100])
def test_calibration_error_is_the_gap_between_confidence_and_accuracy(share):
    table = answers_right([place < share for place in range(100)], LABELS)
    assert at.calibration_error(table, LABELS) == pytest.approx(abs(0.7 - share / 100), abs=1e-6)


@pytest.mark.parametrize(("confident", "unsure"), [(0.9, 0.5), (0.62, 0.68)])
def test_calibration_errors_of_two_bins_of_fifteen_do_not_cancel(confident, unsure):
    right = answers_right([True] * 100, LABELS, confident)
    wrong = answers_right([False] * 100, LABELS, unsure)
    halves = torch.cat([right[:50], wrong[50:]])
    wanted = 0.5 * (1 - confident) + 0.5 * unsure
    assert at.calibration_error(halves, LABELS) == pytest.approx(wanted, abs=1e-6)
    assert at.calibration_error(one_hot(LABELS, 4).float(), LABELS) == 0


def test_a_gains_interval_is_that_of_a_bootstrap_by_hand_and_knows_of_the_pairs():
    random = np.random.default_rng(1)
    labels = torch.arange(3000) % 4
    first = random.random(3000) < 0.8
    second = first ^ (random.random(3000) < 0.05)  # they agree on 95 %
    tables = [answers_right(right.tolist(), labels) for right in (first, second)]
    gain, found = at.paired_gain(*tables, labels)
    assert at.paired_gain(tables[0], tables[0], labels) == (0, [0, 0])
    difference = first.astype(float) - second
    assert gain == pytest.approx(difference.mean())
    means = [difference[random.integers(0, 3000, 3000)].mean() for _ in range(4000)]
    assert found == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=6e-4)


APART = np.array([-0.5, 0, 0.5])  # of variance 1/4


@pytest.mark.parametrize(("differences", "variance", "student"), [
    (np.tile([1.0] * 10 + [0.0] * 90, (3, 1)), 0.1 * 0.9 / 99, 1.984),  # seeds agree: 99 degrees
    (np.tile(APART[:, None] + 0.1, (1, 50)), 0.25 / 3, 4.303),  # images agree: 2 degrees
    (np.add.outer(APART, APART + 0.1), 0.25 / 3 + 0.25 / 3, 2.776),  # Satterthwaite: 4 degrees
    (np.array([[1.0] * 10 + [0.0] * 90]), 0.1 * 0.9 / 99, 1.984)])  # one seed: images alone
def test_the_crossed_interval_is_students_with_satterthwaites_degrees(differences, variance,
                                                                     student):
    change, (low, high) = at.crossed_interval(differences)
    assert change == pytest.approx(0.1)
    assert (high - change, change - low) == pytest.approx([student * variance**0.5] * 2, rel=0.02)


def test_images_that_all_changed_alike_tell_nothing_of_others():
    assert at.crossed_interval(np.zeros((3, 50))) == (0.0, [0.0, 0.0])
    for change in (1.0, -1.0):
        assert at.crossed_interval(np.full((3, 2), change)) == (change, [-1.0, 1.0])


def test_the_crossed_interval_holds_the_truth_where_seeds_and_images_both_vary():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(60):  # the true change is 0.02
        chance = 0.02 + random.normal(0, 0.02, 3)[:, None] + random.normal(0, 0.2, 400)
        differences = np.where(random.random((3, 400)) < np.abs(chance), np.sign(chance), 0)
        low, high = at.crossed_interval(differences)[1]
        held += low <= 0.02 <= high
    assert held > 0.9 * 60


TRUE_SHARES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]])  # two kinds of images
KINDS = torch.arange(2).repeat_interleave(100)  # 100 of each, labelled in exactly these shares
KIND_LABELS = torch.cat([torch.arange(3).repeat_interleave((100 * shares).round().long())
                         for shares in TRUE_SHARES])


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.5])
def test_the_temperature_undoes_what_made_the_logits_too_large_or_too_small(sharpness):
    table = (sharpness * TRUE_SHARES.log()).softmax(1)[KINDS]
    data = data_with(KIND_LABELS, KIND_LABELS, "abc")
    found = at.calibrate(table, table, data)
    assert found["temperature"] == pytest.approx(sharpness, rel=0.02)
    true_loss = at.score(TRUE_SHARES[KINDS], KIND_LABELS)[0]
    assert found["calibrated_loss"] == pytest.approx(true_loss, abs=1e-4)
    assert found["calibrated_error"] < 0.01
    data.labels[data.split["test"]] = 0  # what the test images have no say in
    assert at.calibrate(table, table, data)["temperature"] == found["temperature"]


@pytest.mark.parametrize(("images", "mistakes", "found"), [
    (99, 30, False), (100, 30, True), (400, 0, False), (400, 9, False), (400, 10, True)])
def test_too_few_images_or_mistakes_give_no_temperature(images, mistakes, found):
    labels = torch.arange(images) % 4
    table = answers_right([place >= mistakes for place in range(images)], labels)
    figures = at.calibrate(table, table, data_with(labels, labels))
    assert [value is not None for value in figures.values()] == [found] * 3


def test_a_temperature_divides_the_logits_and_keeps_the_order_of_the_classes():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    warmer = at.at_temperature(logits.softmax(1), 2.0)
    torch.testing.assert_close(warmer, (logits / 2).softmax(1))
    assert torch.equal(warmer.argsort(1), logits.argsort(1))
    for nothing in (None, 1.0):
        unchanged = at.at_temperature(logits.softmax(1), nothing)
        torch.testing.assert_close(unchanged, logits.softmax(1))
    assert at.at_temperature(one_hot(torch.arange(4)).float(), 5.0).isfinite().all()


# 6 cats: 4 right, 2 taken for dogs. 3 dogs: 3 right. 1 owl: taken for a cat. No test image of rats.
TRUTH = torch.tensor([0] * 6 + [1] * 3 + [2])
CLASSES = at.by_class(answers([0, 0, 0, 0, 1, 1, 1, 1, 1, 0]), TRUTH, ["cat", "dog", "owl", "rat"])


def test_recall_precision_and_f1_of_each_class_by_hand():
    cat, dog, owl, rat = CLASSES
    assert (cat["recall"], cat["precision"]) == pytest.approx((4 / 6, 4 / 5))
    assert (dog["recall"], dog["precision"]) == pytest.approx((1, 3 / 5))
    assert (owl["recall"], owl["precision"], owl["f1"]) == (0, None, 0)
    assert (rat["recall"], rat["recall_interval"], rat["f1"]) == (None, None, 0)
    assert cat["f1"] == pytest.approx(2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))
    assert cat["recall_interval"] == at.wilson_interval(4 / 6, 6)
    assert [entry["errors"] for entry in CLASSES] == [2, 0, 1, 0]
    assert [entry["images"] for entry in CLASSES] == [6, 3, 1, 0]


def test_each_class_that_has_images_counts_alike_however_rare():
    found = at.over_classes(CLASSES)
    assert found["balanced_accuracy"] == pytest.approx((4 / 6 + 1 + 0) / 3)
    assert found["macro_f1"] == pytest.approx(sum(entry["f1"] for entry in CLASSES[:3]) / 3)


def model(right: list[bool], validation_accuracy: float, confidence: float = 0.7) -> at.Tested:
    """A finished model, right without TTA on these test images, with TTA on the last ones less."""
    plain = answers_right(right, LABELS, confidence)
    averaged = answers_right([*right[:90], *[False] * 10], LABELS, confidence)
    entry = dict(name="one", stands_in_for=None, epochs=[], parameters=1, train_accuracy=1.0,
                 validation_accuracy=validation_accuracy, seconds=10.0,
                 **at.judge(plain, LABELS, "test_"), **at.judge(averaged, LABELS, "tta_"))
    return at.Tested(plain, averaged, entry, validation=plain)


def test_the_vote_is_compared_with_the_model_best_on_validation_with_tta_and_without():
    chosen = model([place < 55 or place >= 95 for place in range(100)], 0.9)
    better = model([place < 80 or place > 95 for place in range(100)], 0.8, confidence=0.8)
    vote = at.describe_vote([chosen, better], data_with(LABELS, LABELS))
    assert vote["accuracy"] == vote["test_accuracy"] == pytest.approx(0.84)  # the surer one's
    assert vote["gain_over_best"] == pytest.approx(0.24)
    assert vote["tta_accuracy"] == pytest.approx(0.8)
    assert vote["tta_gain_over_best"] == pytest.approx(0.25)
    assert vote["disagreement"] == pytest.approx(0.26) and vote["seconds"] == 20
    mixed = at.soft_vote([chosen.plain, better.plain])
    assert vote["test_loss"] == pytest.approx(at.score(mixed, LABELS)[0])
