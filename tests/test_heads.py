"""Networks whose head is no plain classifier on pooled features train too, or are refused."""

import pytest
import torch
from conftest import quick_flags, random_data, run_of
from torch import nn

import advanced_techniques as at


@pytest.mark.parametrize("architecture", ["crossvit_9_240", "resnetv2_50", "dla34", "dpn48b"])
def test_whatever_the_head_it_learns_and_is_judged(architecture):
    size = 240 if architecture.startswith("crossvit") else 32
    run = run_of(architecture, NUM_EPOCHS=20, FEATURE_VIEWS=2, IMAGE_SIZE=size)
    data = random_data()
    assert at.groups_learning(0, run) == 1
    assert at.train_epoch(run, data, 0)["train_loss"] > 0
    answers = at.validate(run, data)
    assert answers.shape == (10, 4)
    whole = at.predict(run, data, "validation", at.VIEWS[:1])[0]
    torch.testing.assert_close(answers, whole, rtol=1e-3, atol=1e-4)


def test_looking_for_a_border_draws_no_random_number_of_the_run():
    run, data = run_of("efficientnet_b0", NUM_EPOCHS=20), random_data()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    at.unfreeze(run, 1)
    assert at.keep_features(run, data, 0).tail is not None
    assert torch.equal(torch.get_rng_state(), before)


class TwoHeads(nn.Module):
    """Like volo: a second head has a say that the classifier doesn't know of."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2)
        self.share = share

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.body(images.mean((2, 3)))
        return self.head(pooled) + self.share * self.second(pooled)


class InPlace(nn.Module):
    """Its head changes what it is given: kept features would be others at the next epoch."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Sequential(nn.SiLU(inplace=changes), nn.Linear(3, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images.mean((2, 3))))


@pytest.mark.parametrize(("network", "cut"), [
    (TwoHeads(0.5), False), (TwoHeads(0.0), True), (InPlace(True), False), (InPlace(False), True)])
def test_what_does_not_answer_as_the_whole_twice_is_not_used(network, cut):
    run, data = run_of("test_resnet", NUM_EPOCHS=20), random_data()
    run.network = network
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    assert (at.cut_network(run, data, 2)[1] is not None) == cut


@pytest.mark.parametrize(("architecture", "size"), [
    ("pit_ti_224", 224), ("rdnet_tiny", 64), ("poolformer_s12", 64), ("levit_128s", 224)])
def test_what_this_script_can_not_train_is_refused_by_name(architecture, size, capsys):
    flags = quick_flags(ARCHITECTURES=(architecture,), IMAGE_SIZE=size, BATCH_SIZE=2)
    with pytest.raises(SystemExit) as stopped:
        at.check_image_size(flags)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and architecture in message and "Choose another" in message


@pytest.mark.parametrize("answer", [(torch.zeros(3, 2), torch.zeros(3, 2)), torch.zeros(3, 2, 5),
                                    torch.zeros(3, 7)])
def test_an_answer_that_is_no_table_of_classes_is_refused(answer, capsys):
    with pytest.raises(SystemExit):
        at.check_answer("several", answer)
    assert "several answers an image with more than" in capsys.readouterr().err
    at.check_answer("one", torch.zeros(3, 2))


@pytest.mark.parametrize("memory", [0.0, 4.0])
def test_what_learns_is_in_training_mode_and_what_is_frozen_in_eval_mode(memory):
    run, data = run_of("resnet18", NUM_EPOCHS=20, MEMORY_GB=memory), random_data()
    at.unfreeze(run, 2)
    at.plan_epoch(run, data, 5)  # looks for the border in eval mode, and makes the features in it
    part = at.learning_part(run)
    assert (part is run.network) == (memory == 0)
    assert run.network.layer4.training and run.network.layer4[0].bn1.training
    assert not run.network.bn1.training and not run.network.layer3.training
