"""Each class by itself: recall, precision and rare classes, and which images to look at."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags, random_data, run_of
from test_data import make_folder
from test_evidence import healthy

import advanced_techniques as at


def answers(predicted: list[int], classes: int, confidence: list[float] | None = None):
    """Probabilities [n, classes] of which the predicted ones are the largest."""
    confidence = confidence or [0.9] * len(predicted)
    table = torch.empty(len(predicted), classes)
    for row, (label, share) in enumerate(zip(predicted, confidence, strict=True)):
        table[row] = (1 - share) / (classes - 1)
        table[row, label] = share
    return table


# 6 cats: 4 right, 2 taken for dogs. 3 dogs: 3 right. 1 owl: taken for a cat. No test image of rats.
TRUTH = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
PREDICTED = [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
NAMES = ["cat", "dog", "owl", "rat"]


def test_recall_precision_and_f1_of_each_class_by_hand():
    cat, dog, owl, rat = at.by_class(answers(PREDICTED, 4), TRUTH, NAMES)
    assert (cat["recall"], cat["precision"]) == pytest.approx((4 / 6, 4 / 5))
    assert (dog["recall"], dog["precision"]) == pytest.approx((1, 3 / 5))
    assert owl["recall"] == 0 and owl["precision"] is None and owl["precision_interval"] is None
    assert rat["recall"] is None and rat["f1"] == 0
    assert cat["f1"] == pytest.approx(2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))
    assert cat["recall_interval"] == at.wilson_interval(4 / 6, 6)
    assert cat["precision_interval"] == at.wilson_interval(4 / 5, 5)
    assert [entry["errors"] for entry in (cat, dog, owl, rat)] == [2, 0, 1, 0]


def test_each_class_counts_alike_however_rare():
    entries = at.by_class(answers(PREDICTED, 4), TRUTH, NAMES)
    summary = at.over_classes(entries)
    assert summary["balanced_accuracy"] == pytest.approx((4 / 6 + 1 + 0) / 3)
    assert summary["macro_f1"] == pytest.approx(sum(entry["f1"] for entry in entries[:3]) / 3)
    cat, dog, owl = (at.wilson_interval(right / of, of) for right, of in ((4, 6), (3, 3), (0, 1)))
    below = math.hypot(4 / 6 - cat[0], 1 - dog[0], 0 - owl[0]) / 3
    above = math.hypot(cat[1] - 4 / 6, dog[1] - 1, owl[1] - 0) / 3
    wanted = [summary["balanced_accuracy"] - below, summary["balanced_accuracy"] + above]
    assert summary["balanced_interval"] == pytest.approx(wanted)


def test_the_interval_of_balanced_accuracy_holds_the_truth_about_19_times_in_20():
    random = np.random.default_rng(0)
    chances, images = [0.95, 0.9, 0.6], [200, 50, 8]
    held = 0
    for _ in range(500):
        right = random.binomial(images, chances)
        entries = [dict(images=count, recall=hits / count, f1=0.0,
                        recall_interval=at.wilson_interval(hits / count, count))
                   for count, hits in zip(images, right, strict=True)]
        low, high = at.over_classes(entries)["balanced_interval"]
        held += low <= np.mean(chances) <= high
    assert 0.91 < held / 500 < 0.99


def test_the_report_lists_the_hardest_class_first_and_says_how_many_more_there_are():
    results = dict(classes=at.by_class(answers(PREDICTED, 4), TRUTH, NAMES))
    results["over_classes"] = at.over_classes(results["classes"])
    table = at.classes_table(results)
    assert [line.split()[0] for line in table[1:4]] == ["owl", "cat", "dog"]
    assert "0.0%" in table[1] and "-" in table[1] and "66.7%" in table[2]
    assert "55.6%" in "".join(table) and "rat" not in "".join(table)
    names = [f"class{label}" for label in range(30)]
    results["classes"] = at.by_class(answers(list(range(30)), 30), torch.arange(30), names)
    assert "and 10 more in results.json." in at.classes_table(results)
    assert at.classes_table(dict(classes=None)) == []


def test_a_class_that_is_never_named_is_drawn_too():
    entries = at.by_class(answers(PREDICTED, 4), TRUTH, NAMES)
    figure = at.plot_classes(entries)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["owl", "cat", "dog"]
    dots = sorted(line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o")
    assert dots == pytest.approx([0, 60, 400 / 6, 80, 100])
    assert len(figure.legends[0].get_texts()) == 2


def job_with(data: at.Data, probabilities: torch.Tensor, folder) -> at.Job:
    entry = dict(name="model", test_accuracy=0.5, validation_accuracy=0.5, temperature=2.0)
    tested = at.Tested(entry, probabilities, probabilities)
    flags = quick_flags(ARCHITECTURES=("model",), OUTPUT_DIR=str(folder))
    return at.Job(flags, CPU, data, tested=[tested])


def test_the_most_confidently_wrong_test_images_stand_first(tmp_path):
    data = random_data()
    data.split["test"] = torch.tensor([3, 9, 11, 20])
    data.labels[[3, 9, 11, 20]] = torch.tensor([0, 1, 1, 2])
    table = answers([0, 0, 3, 2], 4, [0.6, 0.7, 0.8, 0.9])
    job = job_with(data, table, tmp_path)
    at.write_test_predictions(job, dict(ensemble=dict(accuracy=None), models=[
        job.tested[0].entry], flags=vars(job.flags)))
    with (tmp_path / "test_predictions.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["image", "true_class", "predicted_class", "probability"]
    names = data.classes
    assert [row[:3] for row in rows] == [["11", names[1], names[3]], ["9", names[1], names[0]],
                                         ["3", names[0], names[0]], ["20", names[2], names[2]]]
    tempered = at.at_temperature(table, 2.0).amax(1)
    assert [float(row[3]) for row in rows] == pytest.approx(
        tempered[[2, 1, 0, 3]].tolist(), abs=1e-4)


def test_the_labels_that_all_models_doubt_stand_first(tmp_path):
    data = random_data()
    job = job_with(data, answers([0] * 10, 4), tmp_path)
    job.tested = [job.tested[0], at.Tested(dict(job.tested[0].entry), *[answers([0] * 10, 4)] * 2)]
    job.tested[0].belief = torch.linspace(0.5, 0.99, 20)
    job.tested[1].belief = torch.full((20,), 0.9)
    job.tested[1].belief[7] = 0.05
    at.write_train_labels(job)
    with (tmp_path / "train_labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    mean = (job.tested[0].belief + job.tested[1].belief) / 2
    assert [int(row["image"]) for row in rows] == mean.argsort().tolist()
    assert rows[0]["image"] == "7"
    assert float(rows[0]["belief"]) == pytest.approx(float(mean[7]), abs=1e-4)
    assert rows[0]["class"] == data.classes[int(data.labels[7])]


def test_belief_is_the_probability_of_each_training_image_s_own_label(tmp_path):
    run, data = run_of("test_resnet", NUM_EPOCHS=1, OUTPUT_DIR=str(tmp_path)), random_data()
    at.train_model(run, data)
    learned = at.predict(run, data, "train", at.VIEWS[:1])[0]
    tested = at.judge_model(run, data, at.predict(run, data, "test", at.VIEWS[:1]), 1.0)
    at.finish(run, data, tested, True)
    wanted = [learned[place, label] for place, label in enumerate(data.labels[:20])]
    assert tested.belief.tolist() == pytest.approx([float(share) for share in wanted], abs=1e-6)


def test_a_run_on_a_folder_names_files_and_predict_tells_its_accuracy(tmp_path, capsys):
    folder = make_folder(tmp_path / "pets", count=30)
    output = ["--output-dir", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    at.main(["--dataset", str(folder), "--architectures", "test_resnet", "--pretrained", "none",
             "--image-size", "32", "--num-epochs", "1", "--batch-size", "16",
             "--gradient-accumulation-steps", "1", *output])
    printed = capsys.readouterr().out
    assert "\nClasses\n" in printed and "Balanced accuracy" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["over_classes"]["balanced_interval"]
    assert sum(results["dataset"]["train_images_by_class"]) == results["dataset"]["train_images"]
    with (tmp_path / "out" / "test_predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == results["dataset"]["test_images"]
    for row in rows:
        assert f"/{row['true_class']}/" in row["image"] and (tmp_path / row["image"]).is_file()
    right = [row["true_class"] == row["predicted_class"] for row in rows]
    assert right == sorted(right)  # the wrong ones first
    final = results["models"][0]
    assert sum(right) / len(right) == pytest.approx(final["tta_accuracy"])
    # A test set that came later: one image in no class's folder
    later = make_folder(tmp_path / "later", count=4)
    (later / "owl" / "0.png").rename(later / "0.png")
    at.main(["--predict", str(later), *output])
    printed = capsys.readouterr().out
    with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    counted = [row for row in rows if row["path"] != str(later / "0.png")]
    share = sum(f"/{row['class_1']}/" in row["path"] for row in counted) / len(counted)
    assert f"Accuracy: {share:.1%} (" in printed and "of the 11 images" in printed
    assert "in no such folder, and don't count: 1." in printed and "Balanced accuracy" in printed
    assert "may be among these" not in printed
    at.main(["--predict", str(later / "cat"), *output])
    assert "Accuracy" not in capsys.readouterr().out
    at.main(["--predict", str(folder), *output])
    assert "models learned from may be among these" in capsys.readouterr().out


def uneven_data() -> at.Data:
    """15 images to train on of the first class, 5 of the second, none of the two others."""
    data = random_data()
    data.labels[:20] = torch.tensor([0] * 15 + [1] * 5)
    return data


def test_balance_adds_half_the_logarithm_of_each_class_share_to_the_logits():
    data = uneven_data()
    prior = at.log_prior(data, quick_flags(BALANCE=True), CPU)
    assert prior[:2].exp().square().tolist() == pytest.approx([0.75, 0.25])
    assert prior.isfinite().all()
    assert at.log_prior(data, quick_flags(), CPU).tolist() == [0, 0, 0, 0]
    assert at.new_run("test_resnet", at.Weights("test_resnet", "", None), 0, at.Job(
        quick_flags(BALANCE=True), CPU, data)).prior.tolist() == prior.tolist()


def test_balance_changes_the_loss_that_is_learned_from_and_nothing_that_is_answered():
    data = uneven_data()
    gradients = {}
    for balance in (False, True):
        run = run_of("test_resnet", NUM_EPOCHS=1, LABEL_SMOOTHING=0.1)
        run.prior = at.log_prior(data, quick_flags(BALANCE=balance), CPU)
        run.network.requires_grad_(True).eval()
        images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 0, 1, 1, 0, 1])
        wanted = torch.nn.functional.cross_entropy(
            run.network(images) + run.prior, labels, label_smoothing=0.1)
        bias = run.network.get_classifier().bias
        gradients[balance] = torch.autograd.grad(wanted, bias)[0]
        before = bias.detach().clone()
        run.optimizer = torch.optim.SGD(run.parameters, lr=0.1)
        for group in run.optimizer.param_groups:
            group["layer"] = 0
        at.apply_update(run, run.network, [(images, labels, True)], 6, [0.1])
        step = (before - bias.detach()) / 0.1
        direction = gradients[balance] / gradients[balance].norm()
        torch.testing.assert_close(step / step.norm(), direction, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gradients[False], gradients[True], rtol=0.1)


@pytest.mark.parametrize(("counts", "balance", "said"), [
    ([301, 100], False, True), ([300, 100], False, False), ([301, 100], True, False)])
def test_the_diagnosis_says_what_balance_would_be_for(counts, balance, said):
    results = healthy()
    results["dataset"] |= dict(train_images_by_class=counts)
    results["flags"] = at.FLAGS | dict(BALANCE=balance)
    findings = " ".join(at.diagnose(results))
    assert ("--balance true" in findings) == said
    assert not said or "301 images to train on of cat, 100 of dog" in findings
