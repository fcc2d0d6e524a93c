"""What only a GPU can show; skipped, with the reason, where there is none."""

import pytest
import torch
from conftest import in_precision, random_data, run_of

import advanced_techniques as at

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("mixed", [torch.float16, None])
def test_an_update_does_not_wait_for_the_gpu(mixed):
    run, data = in_precision(run_of("resnet18", device=GPU), mixed), random_data(device="cuda")
    at.unfreeze(run, 2)
    part = at.deal_out(run, data, 0)[0]
    rates = [0.01] * len(run.groups)

    def update():
        batches = at.micro_batches(run, data, part)
        return at.apply_update(run, run.network, batches, part.images, rates)

    update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp16_trains_and_the_speed_section_compares_it_with_fp32():
    run = run_of("resnet18", device=GPU, NUM_EPOCHS=4, USE_MIXED_PRECISION=True)
    data = random_data(device="cuda")
    at.train_model(run, data)
    speed = at.measure_speed(run, data)
    assert speed["mixed_images_per_second"] > 0 and speed["fp32_peak_bytes"] > 0
    assert run.precision == torch.float16


def test_augmentation_is_the_same_as_on_the_cpu():
    images = random_data().images[:8]
    views = at.choose_views(torch.rand(8, len(at.RANDOM_NUMBERS)), True)
    there = at.augment(images.to(GPU), views.to(GPU), run_of("resnet18", device=GPU)).cpu()
    here = at.augment(images, views, run_of("resnet18"))
    torch.testing.assert_close(there, here, rtol=0, atol=1e-2)


def test_a_real_lack_of_gpu_memory_halves_the_micro_batch_and_training_goes_on():
    run = run_of("resnet18", device=GPU, NUM_EPOCHS=1, IMAGE_SIZE=224, BATCH_SIZE=256,
                 GRADIENT_ACCUMULATION_STEPS=1, GRADUAL_UNFREEZING=False)
    # All layers learn: 256 images take several gigabytes.
    data = random_data(count=512, side=256, device="cuda")
    torch.cuda.empty_cache()
    everything = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(1.5e9 / everything)
    try:
        entry = at.train_epoch(run, data, 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.micro_batch < 256 and entry["train_loss"] > 0 and entry["skipped_updates"] == 0
