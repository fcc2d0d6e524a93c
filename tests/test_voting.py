"""Test-time augmentation and soft voting are plain means of separately computed probabilities."""

import pytest
import torch
from conftest import quick_flags, random_data, run_of

import advanced_techniques as at


def test_tta_is_the_mean_over_views_computed_one_by_one():
    run, data = run_of("resnet18"), random_data()
    together = at.predict(run, data, "test", at.tta_views(run.flags))
    one_by_one = [at.predict(run, data, "test", [options])[0] for options in at.VIEWS]
    assert together.shape == (4, 10, 4)
    torch.testing.assert_close(at.soft_vote(together), sum(one_by_one) / 4, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.sum(-1), torch.ones(4, 10))


def test_views_differ_and_a_mirrored_view_is_the_view_of_the_mirrored_image():
    run, data = run_of("resnet18"), random_data()
    images = data.images[:4]
    plain, mirrored, zoomed, _ = (at.show(images, run, **options) for options in at.VIEWS)
    torch.testing.assert_close(mirrored, at.show(images.flip(-1), run), rtol=0, atol=1e-4)
    assert not torch.allclose(plain, zoomed, atol=0.1)


def test_a_view_at_the_stored_scale_is_the_normalised_middle():
    run, data = run_of("resnet18"), random_data()  # stored 36 px, seen 32 px
    wanted = data.images[:2, :, 2:34, 2:34] / 255
    mean = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, as timm states them for this network
    std = torch.tensor([0.229, 0.224, 0.225])
    wanted = (wanted - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(at.show(data.images[:2], run), wanted, rtol=0, atol=1e-4)


def test_no_mirrored_view_where_left_and_right_matter():
    views = at.tta_views(quick_flags(HORIZONTAL_FLIP=False))
    assert all("mirror" not in options for options in views)
    assert at.tta_views(quick_flags(USE_TTA=False)) == [{}] and at.VIEWS[0] == {}


def test_soft_voting_is_the_mean_and_the_order_of_models_does_not_matter():
    voters = [torch.rand(50, 4).softmax(-1) for _ in range(3)]
    torch.testing.assert_close(at.soft_vote(voters), (voters[0] + voters[1] + voters[2]) / 3)
    assert torch.equal(at.soft_vote(voters), at.soft_vote(voters[::-1]))


def finished(plain, averaged, validation=(0.5, 0.5, 0.5)):
    """Finished models that answered so."""
    entries = [dict(validation_accuracy=accuracy) for accuracy in validation]
    return [at.Tested(*model) for model in zip(entries, plain, averaged, strict=True)]


def test_the_ensemble_can_be_right_where_most_models_are_unsure():
    data = random_data()
    labels = data.labels[data.split["test"]]
    right = torch.nn.functional.one_hot(labels, 4).float()
    wrong = torch.nn.functional.one_hot((labels + 1) % 4, 4).float()
    sure, unsure = right, 0.45 * right + 0.55 * wrong
    models = finished([sure, unsure, unsure], [unsure, unsure, unsure])
    result = at.evaluate_ensemble(models, data.truth("test"))
    assert result["accuracy"] == 1.0 and result["tta_accuracy"] == 0.0
    assert result["gain_over_best"] == 0 and result["tta_gain_over_best"] == 0
    assert result["disagreement"] == 1.0 and result["shared_errors"] == 0


def test_an_ensemble_gains_where_each_model_errs_elsewhere():
    data = random_data(count=120)  # 30 to test on
    labels = data.labels[data.split["test"]]
    right = torch.nn.functional.one_hot(labels, 4).float()
    wrong = torch.nn.functional.one_hot((labels + 1) % 4, 4).float()
    third = torch.arange(30)[:, None] % 3
    unsure = 0.6 * wrong + 0.4 * right
    voters = [torch.where(third == index, unsure, right) for index in range(3)]
    result = at.evaluate_ensemble(finished(voters, voters), data.truth("test"))
    assert result["accuracy"] == 1.0 and result["gain_over_best"] == pytest.approx(1 / 3)
    low, high = result["gain_interval"]
    assert 0.1 < low < 1 / 3 < high and result["shared_errors"] == 0


def test_the_gain_with_tta_is_that_of_votes_and_models_with_tta():
    data = random_data(count=120)  # 30 to test on
    labels = data.truth("test")
    right = torch.nn.functional.one_hot(labels, 4).float()
    wrong = right.roll(1, 1)
    result = at.evaluate_ensemble(finished([right] * 3, [wrong, right, right]), labels)
    assert result["gain_over_best"] == 0 and result["tta_gain_over_best"] == 1


@pytest.mark.parametrize("tta", [True, False])
def test_the_report_tells_the_vote_s_gain_as_the_run_answers(tta):
    ensemble = dict(gain_over_best=0.01, gain_interval=[0.0, 0.02], gain_chance=0.1,
                    tta_gain_over_best=0.005, tta_gain_interval=[-0.01, 0.02],
                    tta_gain_chance=0.3, disagreement=0.125)
    said = " ".join(at.ensemble_lines(ensemble, tta))
    assert "+1.0 (+0.0 to +2.0) points" in said and "disagree on 12.5%" in said
    assert ("where both have TTA, +0.5 (-1.0 to +2.0) points, p = 0.3." in said) == tta


@pytest.mark.parametrize(("errors", "shared"), [((0, 0), None), ((4, 2), 0.5), ((4, 4), 1.0)])
def test_errors_are_shared_where_there_are_any(errors, shared):
    data = random_data(count=120)  # 30 to test on
    labels = data.truth("test")
    right = torch.nn.functional.one_hot(labels, 4).float()
    voters = [torch.cat([right[:count].roll(1, 1), right[count:]]) for count in errors]
    result = at.evaluate_ensemble(finished(voters, voters, (0.5, 0.5)), labels)
    assert result["shared_errors"] == shared


def test_the_vote_is_compared_with_the_model_that_is_best_on_validation_not_on_test():
    data = random_data(count=400)  # 100 to test on
    labels = data.truth("test")
    answers = []
    for right in (90, 60, 70):
        predicted = torch.where(torch.arange(100) < right, labels, (labels + 1) % 4)
        answers.append(torch.nn.functional.one_hot(predicted, 4).float())
    models = finished(answers, answers, validation=(0.7, 0.9, 0.8))  # the second one is chosen
    result = at.evaluate_ensemble(models, labels)
    assert result["gain_over_best"] == pytest.approx(result["accuracy"] - 0.6)
    job = at.Job(quick_flags(USE_ENSEMBLE=False), torch.device("cpu"), data, tested=models)
    assert torch.equal(at.final_probabilities(job), answers[1])
