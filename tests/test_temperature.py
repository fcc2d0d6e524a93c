"""One temperature a model and one for the vote: fitted on validation images, used by --predict."""

import json
import math

import pytest
import torch
from conftest import CPU, quick_flags, random_data, run_of

import advanced_techniques as at


def answers(count: int, sharpness: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities whose logits are so many times the true ones, and labels drawn from the true.

    So the right temperature is the sharpness.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (sharpness * logits).softmax(1), labels


def data_with(validation: torch.Tensor, test: torch.Tensor) -> at.Data:
    """Data whose validation and test images have these labels."""
    labels = torch.cat([validation, test])
    cuts = torch.arange(len(labels)).split([len(validation), len(test)])
    return at.Data("", list("abcd"), torch.zeros(0), labels,
                   dict(zip(("validation", "test"), cuts, strict=True)))


def finished_model(sharpness: float, count: int = 2000) -> tuple[at.Tested, at.Data]:
    """A finished model that is too sure or too unsure, and data that it was tested on."""
    validation, validation_labels = answers(count, sharpness, 1)
    test, test_labels = answers(2000, sharpness, 2)
    model = at.Tested(dict(validation_accuracy=0.5), test, test, validation=validation)
    return model, data_with(validation_labels, test_labels)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.5])
def test_the_temperature_undoes_what_made_the_logits_too_large_or_too_small(sharpness):
    probabilities, labels = answers(4000, sharpness)
    assert at.fit_temperature(probabilities, labels) == pytest.approx(sharpness, rel=0.05)


def test_no_other_temperature_explains_the_labels_better():
    probabilities, labels = answers(500, 1.7)
    fitted = at.fit_temperature(probabilities, labels)
    losses = {}
    for place in range(-100, 101):
        temperature = fitted * math.exp(place / 100)
        losses[place] = at.score(at.at_temperature(probabilities, temperature), labels)[0]
    assert min(losses, key=losses.get) == 0


def test_a_temperature_divides_the_logits_and_keeps_the_order():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    warmer = at.at_temperature(logits.softmax(1), 2.0)
    torch.testing.assert_close(warmer, (logits / 2).softmax(1))
    assert torch.equal(warmer.argsort(1), logits.argsort(1))
    torch.testing.assert_close(at.at_temperature(logits.softmax(1), 1.0), logits.softmax(1))
    sure = torch.nn.functional.one_hot(torch.arange(4)).float()
    assert at.at_temperature(sure, 5.0).isfinite().all()


@pytest.mark.parametrize("sharpness", [0.4, 2.5])
def test_calibrated_answers_can_be_believed(sharpness):
    model, data = finished_model(sharpness)
    found = at.calibrate(model.validation, model.averaged, data)
    labels = data.truth("test")
    assert found["calibrated_error"] < 0.03 < at.calibration_error(model.averaged, labels)
    assert found["calibrated_loss"] < at.score(model.averaged, labels)[0]


def test_the_test_images_have_no_say_in_the_temperature():
    model, data = finished_model(2.5)
    first = at.calibrate(model.validation, model.averaged, data)
    data.labels[data.split["test"]] = 0
    second = at.calibrate(model.validation, model.averaged, data)
    assert first["temperature"] == second["temperature"]
    assert first["calibrated_loss"] != second["calibrated_loss"]


def test_the_vote_has_a_temperature_of_its_own():
    model, data = finished_model(1.0)
    bold = at.Tested(model.entry, model.plain, model.averaged, validation=model.validation)
    bold.validation = at.at_temperature(model.validation, 0.3)
    bold.averaged = at.at_temperature(model.averaged, 0.3)
    found = at.calibrate_vote([model, bold], data)
    vote = at.soft_vote([model.validation, bold.validation])
    assert found["temperature"] == at.fit_temperature(vote, data.truth("validation"))
    assert found["temperature"] != pytest.approx(1.0, rel=0.05)
    bold.validation = None  # as in a checkpoint of an older version
    assert at.calibrate_vote([model, bold], data)["temperature"] is None


@pytest.mark.parametrize(("count", "fitted"), [(99, False), (100, True)])
def test_too_few_validation_images_fit_nothing_and_that_is_said(count, fitted):
    model, data = finished_model(2.5, count)
    found = at.calibrate(model.validation, model.averaged, data)
    assert (found["temperature"] is not None) == fitted
    assert (str(count) in found["temperature_why"]) != fitted


@pytest.mark.parametrize(("mistakes", "fitted"), [(0, False), (9, False), (10, True)])
def test_too_few_mistakes_fit_nothing_for_any_certainty_would_look_justified(mistakes, fitted):
    labels = torch.arange(400) % 4
    taken_for = torch.where(torch.arange(400) < mistakes, (labels + 1) % 4, labels)
    sure = 0.6 * torch.nn.functional.one_hot(taken_for, 4) + 0.1
    found = at.calibrate(sure, sure, data_with(labels, labels))
    assert (found["temperature"] is not None) == fitted
    assert (f"{mistakes} of 400" in found["temperature_why"]) != fitted


def test_a_finished_model_keeps_validation_answers_made_with_the_views_of_predict(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(at, "MIN_CALIBRATION_IMAGES", 10)
    monkeypatch.setattr(at, "MIN_CALIBRATION_ERRORS", 1)
    monkeypatch.setattr(at, "measure_speed", lambda run, data: {})
    monkeypatch.setattr(at, "measure_architecture", lambda run, data: {})  # it spends the model
    run, data = run_of("test_resnet", OUTPUT_DIR=str(tmp_path), NUM_EPOCHS=1), random_data()
    model = at.train_and_test(run, data)
    wanted = at.predict(run, data, "validation", at.VIEWS).mean(0)
    assert len(at.VIEWS) == 4
    torch.testing.assert_close(model.validation, wanted)
    truth = data.truth("validation")
    assert model.entry["temperature"] == at.fit_temperature(model.validation, truth)
    for found, answers in (
        (model.entry, model.averaged),  # with the views that --predict answers with
        (at.calibrate_vote([model, model], data), model.averaged),
    ):
        sharpened = at.at_temperature(answers, found["temperature"])
        loss, _ = at.score(sharpened, data.truth("test"))
        assert found["calibrated_loss"] == pytest.approx(loss)
        assert not torch.allclose(model.plain, model.averaged)
    run.flags.RESUME = True
    resumed = at.resume(run, data)
    assert torch.equal(resumed.validation, model.validation)
    assert resumed.entry == model.entry


def finished_run(tmp_path) -> at.Job:
    """A job of two trained models in tmp_path, reported, whose vote has a temperature."""
    names = ("test_resnet", "test_vit")
    flags = quick_flags(ARCHITECTURES=names, PRETRAINED="none", NUM_EPOCHS=1,
                        OUTPUT_DIR=str(tmp_path), USE_MIXED_PRECISION=False)
    job = at.Job(flags, CPU, random_data())
    for name in names:
        job.run = at.new_run(name, at.Weights(name, "random weights", None), 0, job)
        job.tested.append(at.train_and_test(job.run, job.data))
    at.report(job)
    return job


def test_the_report_shows_both_sides_and_predict_answers_at_the_votes_temperature(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(at, "MIN_CALIBRATION_IMAGES", 10)
    monkeypatch.setattr(at, "MIN_CALIBRATION_ERRORS", 1)
    monkeypatch.setattr(at, "fit_temperature", lambda probabilities, labels: 0.2)
    monkeypatch.setattr(at, "measure_speed", lambda run, data: None)
    monkeypatch.setattr(at, "draw_plots", lambda job, results: {})
    job = finished_run(tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    report = (tmp_path / "out" / "report.txt").read_text()
    section = report[report.index("Calibration\n"):]
    for part in (*results["models"], results["ensemble"]):
        assert part["temperature"] == 0.2
        for figure in ("tta_loss", "calibrated_loss", "tta_calibration_error", "calibrated_error"):
            assert f" {part[figure]:.3f}" in section
    assert "ensemble of 2" in section and f"{len(job.data.split['validation'])} valid" in section

    index = int(job.data.split["test"][0])
    picture = at.Image.fromarray(job.data.images[index].permute(1, 2, 0).numpy())
    picture.save(tmp_path / "test.png")
    capsys.readouterr()
    flags = quick_flags(OUTPUT_DIR=str(tmp_path / "out"), PREDICT=str(tmp_path / "test.png"))
    at.predict_files(at.Job(flags, CPU))
    vote = at.final_probabilities(job)[:1]
    first = at.at_temperature(vote, 0.2).max()
    assert abs(first - vote.max()) > 0.03  # else the test could not tell
    printed = capsys.readouterr().out.split(": ")[1].split(",")[0]
    assert float(printed.split()[1].rstrip("%")) / 100 == pytest.approx(first.item(), abs=0.002)


def test_where_nothing_was_fitted_the_report_says_why_and_answers_stay():
    model, data = finished_model(2.5, 99)
    found = at.calibrate(model.validation, model.averaged, data)
    row = at.calibration_row("a model", found, "tta_")
    assert row.startswith("a model ")
    assert row.endswith("not fitted: validation has 99 images, and it takes 100")
    results = dict(models=[dict(found, name="a model", stands_in_for=None, test_accuracy=0.5)],
                   ensemble=dict(accuracy=None, temperature=None), flags=at.FLAGS,
                   dataset=dict(validation_images=99))
    table = " ".join(at.calibration_table(results))
    assert "Fitted on" not in table and "as they are" in table
    # One model is fitted, but the vote, with which --predict answers, is not.
    fitted = dict(found, name="b", stands_in_for=None, test_accuracy=0.5, temperature=0.7,
                  calibrated_loss=1.0, calibrated_error=0.1, tta_loss=1.0,
                  tta_calibration_error=0.1)
    results["models"].append(fitted)
    results["ensemble"] = dict(found, accuracy=0.5)
    table = " ".join(at.calibration_table(results))
    assert "Fitted on" in table and "What --predict answers with has no temperature." in table
    results["ensemble"]["temperature"] = 0.8
    results["ensemble"] |= dict(calibrated_loss=1.0, calibrated_error=0.1, tta_loss=1.0,
                                tta_calibration_error=0.1)
    table = " ".join(at.calibration_table(results))
    assert "--predict answers at the vote's temperature." in table
    assert "One temperature a model and one for the vote (" in table
    results["ensemble"] = dict(accuracy=None, temperature=None)  # USE_ENSEMBLE is off
    results["models"][0] |= dict(validation_accuracy=0.4)
    results["models"][1] |= dict(validation_accuracy=0.6)
    table = " ".join(at.calibration_table(results))
    assert "--predict answers with b, at its temperature." in table
    assert "One temperature a model (" in table
    del results["models"][0]
    table = " ".join(at.calibration_table(results))
    assert "--predict answers at this temperature." in table and "One temperature (" in table
    older = dict(test_accuracy=0.5, validation_accuracy=0.5)  # results from before temperatures
    for model in (older, older | found):
        assert at.final_temperature(dict(ensemble=dict(accuracy=None), models=[model])) == 1.0


def test_without_a_vote_the_temperature_is_that_of_the_model_best_on_validation():
    models = [
        dict(test_accuracy=0.5, validation_accuracy=0.5, temperature=2.0),
        dict(test_accuracy=0.4, validation_accuracy=0.6, temperature=3.0),
        dict(test_accuracy=None, validation_accuracy=0.9, temperature=None),
    ]
    alone = dict(ensemble=dict(accuracy=None), models=models)
    assert at.final_temperature(alone) == 3.0
    vote = dict(ensemble=dict(accuracy=0.7, temperature=0.5), models=models)
    assert at.final_temperature(vote) == 0.5
