"""Test-time augmentation and soft voting are plain means of separately computed probabilities."""

import pytest
import torch
from conftest import model_of, quick_flags, random_data

import advanced_techniques as at


def test_tta_is_the_mean_over_views_computed_one_by_one():
    model, data, flags = model_of("resnet18"), random_data(), quick_flags()
    together = at.predict(model, data, "test", at.tta_views(flags), False, flags)
    one_by_one = [at.predict(model, data, "test", [options], False, flags)[0] for options in at.VIEWS]
    assert together.shape == (4, 10, 4)
    torch.testing.assert_close(at.soft_vote(together), sum(one_by_one) / 4, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.sum(-1), torch.ones(4, 10))


def test_views_differ_and_a_mirrored_view_is_the_view_of_the_mirrored_image():
    model, data = model_of("resnet18"), random_data()
    images = data.images[:4]
    plain, mirrored, zoomed, _ = (at.view(images, 32, model, **options) for options in at.VIEWS)
    torch.testing.assert_close(mirrored, at.view(images.flip(-1), 32, model), rtol=0, atol=1e-4)
    assert not torch.allclose(plain, zoomed, atol=0.1)


def test_a_view_at_the_stored_scale_is_the_normalised_middle():
    model, data = model_of("resnet18"), random_data()  # stored 36 px, seen 32 px
    wanted = data.images[:2, :, 2:34, 2:34] / 255
    wanted = (wanted - model.mean[:, None, None]) / model.std[:, None, None]
    torch.testing.assert_close(at.view(data.images[:2], 32, model), wanted, rtol=0, atol=1e-4)


def test_no_mirrored_view_where_left_and_right_matter():
    assert all("mirror" not in options for options in at.tta_views(quick_flags(HORIZONTAL_FLIP=False)))
    assert at.tta_views(quick_flags(USE_TTA=False)) == [{}] and at.VIEWS[0] == {}


def test_soft_voting_is_the_mean_and_the_order_of_models_does_not_matter():
    voters = [torch.rand(50, 4).softmax(-1) for _ in range(3)]
    torch.testing.assert_close(at.soft_vote(voters), (voters[0] + voters[1] + voters[2]) / 3)
    assert torch.equal(at.soft_vote(voters), at.soft_vote(voters[::-1]))


def test_the_ensemble_can_be_right_where_most_models_are_unsure():
    data = random_data()
    labels = data.labels[data.split["test"]]
    right = torch.nn.functional.one_hot(labels, 4).float()
    wrong = torch.nn.functional.one_hot((labels + 1) % 4, 4).float()
    sure, unsure = right, 0.45 * right + 0.55 * wrong
    result = at.evaluate_ensemble([sure, unsure, unsure], [unsure, unsure, unsure], data)
    assert result["accuracy"] == 1.0 and result["tta_accuracy"] == 0.0
    assert result["gain_over_best"] == 0 and result["disagreement"] == 1.0 and result["shared_errors"] == 0


def test_an_ensemble_gains_where_each_model_errs_elsewhere():
    data = random_data(count=120)  # 30 to test on
    labels = data.labels[data.split["test"]]
    right = torch.nn.functional.one_hot(labels, 4).float()
    wrong = torch.nn.functional.one_hot((labels + 1) % 4, 4).float()
    third = torch.arange(30) % 3
    voters = [torch.where((third == index)[:, None], 0.6 * wrong + 0.4 * right, right) for index in range(3)]
    result = at.evaluate_ensemble(voters, voters, data)
    assert result["accuracy"] == 1.0 and result["gain_over_best"] == pytest.approx(1 / 3)
    assert 0.1 < result["gain_interval"][0] < 1 / 3 < result["gain_interval"][1] and result["shared_errors"] == 0
