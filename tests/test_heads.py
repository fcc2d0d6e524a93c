"""Networks whose head is no plain classifier on pooled features train too, or are refused."""

import pytest
import torch
from conftest import quick_flags, random_data, run_of
from torch import nn

import advanced_techniques as at


@pytest.fixture(autouse=True)
def ask_anew():
    at.has_plain_head.cache_clear()


@pytest.mark.parametrize("architecture", ["dla34", "dpn48b", "resnetv2_50"])
def test_where_features_can_not_be_kept_the_head_learns_from_the_images(architecture):
    run, data = run_of(architecture, NUM_EPOCHS=20, FEATURE_VIEWS=2), random_data()
    assert at.groups_learning(0, run) == 1
    assert at.train_epoch(run, data, 0)["train_loss"] > 0
    assert not run.features and at.learning_part(run) is run.network
    assert at.validate(run, data).shape == (10, 4)


@pytest.mark.parametrize(("architecture", "size"), [("crossvit_tiny_240", 240), ("dla34", 32),
                                                    ("efficientvim_m1", 224), ("resnetv2_50", 32)])
def test_a_head_that_can_not_be_taken_apart_is_not_plain(architecture, size):
    assert not at.has_plain_head(architecture, size)


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_b0", "test_vit"])
def test_a_plain_head_is_recognised_and_no_random_number_of_the_run_is_drawn(architecture):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    size = 160 if architecture == "test_vit" else 32
    assert at.has_plain_head(architecture, size)
    assert torch.equal(torch.get_rng_state(), before)


class TwoHeads(nn.Module):
    """Like volo: a second head has a say that the classifier doesn't know of."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2)
        self.share = share

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    def forward_head(self, pooled: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return pooled if pre_logits else self.head(pooled) + self.share * self.second(pooled)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


@pytest.mark.parametrize(("share", "plain"), [(0.5, False), (0.0, True)])
def test_a_second_head_of_the_same_shape_is_found_by_its_numbers(share, plain, monkeypatch):
    monkeypatch.setattr(at, "new_network", lambda *arguments: TwoHeads(share))
    assert at.has_plain_head("two heads", 32) == plain


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
