"""How images are shown: augmented in training, each in its own way, and in a few ways by rule."""

import pytest
import torch
from conftest import random_data, run_of, tiny_run

import advanced_techniques as at

NUMBERS = at.RANDOM_NUMBERS
# What leaves an image as it is: the whole of it, no mirror, nothing erased, the rest in its middle.
NEUTRAL = dict.fromkeys(NUMBERS, 0.5) | dict(area=1.0, mirror=0.9, erase=0.9)
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])  # of the tiny run
ERASED = dict(erase=0.1, erased_across=0.25, erased_width=0.6, erased_height=1.0)
GREY = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Values from 0 to 1 as a network of that mean and deviation sees them."""
    return (images - MEAN[:, None, None]) / STD[:, None, None]


def views_with(flip: bool = True, **changes: float) -> torch.Tensor:
    return at.choose_views(torch.tensor([list((NEUTRAL | changes).values())]), flip)


def augmented(flip: bool = True, **changes: float) -> torch.Tensor:
    """The first image [3, 36, 36], shown at its own size by such random numbers."""
    views = views_with(flip, **changes)
    return at.augment(random_data().images[:1], views, tiny_run(IMAGE_SIZE=36))[0]


def random_views(count: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return at.choose_views(torch.rand(count, len(NUMBERS), generator=generator), True)


def test_each_image_is_shown_in_its_own_way_that_does_not_depend_on_its_batch():
    run, views = tiny_run(), random_views(16)
    alike = at.augment(random_data().images[:1].repeat(16, 1, 1, 1), views, run)
    assert alike.shape == (16, 3, 32, 32) and alike.is_contiguous(memory_format=torch.channels_last)
    assert all(not torch.allclose(alike[0], other, atol=0.1) for other in alike[1:])
    darker = torch.arange(1, 17, dtype=torch.uint8)[:, None, None, None]
    images = random_data().images[:16] // darker
    together = at.augment(images, views, run)
    alone = [at.augment(images[i:i + 1], views[i:i + 1], run) for i in range(16)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


def test_neutral_numbers_only_normalise_and_a_mirrored_image_is_mirrored_where_it_may_be():
    plain = normalised(random_data().images[0] / 255)
    torch.testing.assert_close(augmented(), plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(augmented(mirror=0.1), plain.flip(-1), rtol=0, atol=1e-3)
    torch.testing.assert_close(augmented(flip=False, mirror=0.1), plain, rtol=0, atol=1e-3)


def test_an_image_is_turned():
    assert not torch.allclose(augmented(turn=0.1), augmented(), atol=0.05)


def test_a_crop_shows_its_part_of_the_image_where_it_was_drawn():
    # Half of each side, all the way to the left and to the bottom.
    corner = augmented(area=(0.25 - 0.4) / 0.6, across=0.0, down=1.0)
    pixels = random_data().images[0, :, 18:, :18].float() / 255
    wanted = torch.nn.functional.interpolate(pixels[None], size=36, mode="bilinear")[0]
    inner = slice(2, -2)  # at the borders a crop shows what is beside it
    torch.testing.assert_close(corner[:, inner, inner], normalised(wanted)[:, inner, inner],
                               rtol=0, atol=1e-3)


def test_what_is_erased_is_a_rectangle_of_the_mean_and_nothing_else_changes():
    erased, plain = augmented(**ERASED), augmented()
    hole = (erased == 0).all(0)
    rows, columns = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
    assert hole.sum() == len(rows) * len(columns)
    assert (len(columns), len(rows)) == (10, 14)  # of 36: 0.1 + 0.3 of its number in each direction
    assert columns.float().mean() == 8.5 and rows.float().mean() == 17.5
    assert torch.equal(erased[:, ~hole], plain[:, ~hole])


def test_colour_is_varied_as_in_the_textbook():
    images = random_data().images[0] / 255
    wanted = 1.2 * images - 0.2 * (images * GREY).sum(0)  # saturation: away from a pixel's grey
    wanted = 0.82 * wanted + 0.18 * (images * GREY).sum(0).mean()  # contrast: to the mean grey
    wanted = normalised(1.24 * wanted)  # brightness
    got = augmented(brightness=0.9, contrast=0.2, saturation=0.7)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)


def test_random_views_keep_to_the_ranges_that_they_promise():
    parts = random_views(4000).split(list(at.VIEW_NUMBERS.values()), dim=1)
    view = dict(zip(at.VIEW_NUMBERS, parts, strict=True))
    window = view["window"].view(-1, 2, 3)
    assert 0.47 < (window[:, 0, 0] < 0).float().mean() < 0.53  # mirrored
    angle = (window[:, 0, 1] / window[:, 0, 0]).atan().rad2deg().abs()
    assert 9.9 < angle.max() < 10.001
    width, height = window[:, :, :2].norm(dim=2).unbind(1)
    area, aspect = width * height, width / height
    assert 0.39 < area.min() < 0.41 and 0.99 < area.max() < 1.001
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    for place, extent in zip(window[:, :, 2].unbind(1), (width, height), strict=True):
        assert (place.abs() + extent).max() < 1.001 and place.std() > 0.05
    light = view["colour"].view(-1, 3, 3).sum(2)  # brightness times contrast, each 0.7 to 1.3
    assert 0.49 <= light.min() < 0.55 and 1.6 < light.max() <= 1.691
    half = view["erased_half"]
    erased = half.amin(1) > 0
    assert 0.22 < erased.float().mean() < 0.28
    assert 0.1 <= half[erased].min() < 0.11 and 0.39 < half[erased].max() <= 0.4


@pytest.mark.parametrize(("architecture", "mean", "std"), [
    ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("tf_efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
def test_a_network_sees_pixels_less_the_mean_over_the_deviation_of_its_weights(
        architecture, mean, std):
    images = torch.tensor([30, 120, 250], dtype=torch.uint8)[None, :, None, None]
    images = images.repeat(1, 1, 36, 36)
    run = run_of(architecture)
    wanted = (torch.tensor([30, 120, 250]) / 255 - torch.tensor(mean)) / torch.tensor(std)
    wanted = wanted[:, None, None].expand(3, 32, 32)
    torch.testing.assert_close(at.show(images, run)[0], wanted, rtol=0, atol=1e-4)
    seen = at.augment(images, views_with(), run)
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=1e-4)


def test_views_by_rule_are_the_middle_and_its_mirror_image_a_fifth_larger():
    run, images = tiny_run(), random_data().images[:3]  # stored at 36 pixels a side, seen at 32
    plain, nearer = (at.show(images, run, **options) for options in at.tta_views(run.flags))
    wanted = normalised(images[:, :, 2:34, 2:34] / 255)
    torch.testing.assert_close(plain, wanted, rtol=0, atol=1e-4)
    unmirrored = at.show(images, run, zoom=1.2)
    torch.testing.assert_close(nearer, unmirrored.flip(-1), rtol=0, atol=1e-4)
    ramp = torch.arange(0, 144, 4, dtype=torch.uint8).expand(1, 3, 36, 36)
    left_to_right = [at.show(ramp, run, **options)[0, 0, 0] for options in at.tta_views(run.flags)]
    slopes = [(line[20] - line[10]).item() / 10 for line in left_to_right]
    step = 4 / 255 / 0.2
    assert slopes == pytest.approx([step, -step / 1.2], rel=1e-3)


@pytest.mark.parametrize(("fit", "stored", "corner"), [
    ("crop", 36, 2), ("crop", 32, 0), ("pad", 36, 0), ("squash", 36, 0)])
def test_only_a_crop_cuts_borders_off(fit, stored, corner):
    run = tiny_run(FIT=fit)
    ramp = torch.arange(0, 4 * stored, 4, dtype=torch.uint8).expand(1, 3, stored, stored)
    seen = (at.show(ramp, run)[0, 0, 0] * 0.2 + 0.4) * 255 / 4  # back to positions in the image
    share = 1 if fit == "crop" else stored / 32  # pixels of the image in a pixel of the view
    first = corner + (share - 1) / 2
    assert seen[0].item() == pytest.approx(first, abs=1e-2)
    assert seen[-1].item() == pytest.approx(stored - 1 - first, abs=1e-2)


def test_inputs_can_be_shown_as_colours_again():
    run, images = tiny_run(IMAGE_SIZE=36), random_data().images[:3]
    torch.testing.assert_close(at.in_colour(at.show(images, run), run), images / 255,
                               rtol=0, atol=1e-3)
