"""What only a GPU can show; skipped, with the reason, where there is none."""

import pytest
import torch
from conftest import model_of, quick_flags, random_data

import advanced_techniques as at

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_gpu():
    model, device = model_of("resnet18"), torch.device("cuda", 0)
    model.network.to(device)
    model.groups = at.layer_groups(model.network)
    model.mean, model.std = model.mean.to(device), model.std.to(device)
    return model, device


@pytest.mark.parametrize("mixed", [torch.float16, None])
def test_an_update_does_not_wait_for_the_gpu(mixed):
    model, device = on_gpu()
    data, flags = random_data(device="cuda"), quick_flags()
    at.unfreeze(model, 2)
    optimizer, scaler = at.make_optimizer(model, flags), at.make_scaler(device, mixed)
    window, views = data.split["train"], at.choose_views(torch.rand(20, at.RANDOM_NUMBERS), True).pin_memory()
    rates = [0.01] * len(model.groups)

    def update():
        return at.apply_update(model.network, at.micro_batches(data, window, views, model, flags), 20, optimizer, scaler,
                               rates, mixed, 0.1)

    update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp16_trains_and_the_speed_section_compares_it_with_fp32():
    model, _ = on_gpu()
    data, flags = random_data(device="cuda"), quick_flags(NUM_EPOCHS=4)
    mixed, _ = at.choose_precision(model.network, model.mean.device, flags)
    at.train_model(model, data, mixed, flags)
    speed = at.measure_speed(model, data, mixed, flags)
    assert speed["mixed_images_per_second"] > 0 and speed["fp32_peak_bytes"] > 0 and mixed == torch.float16


def test_augmentation_is_the_same_as_on_the_cpu():
    model, device = on_gpu()
    images, views = random_data().images[:8], at.choose_views(torch.rand(8, at.RANDOM_NUMBERS), True)
    there = at.augment(images.to(device), views.to(device), 32, model).cpu()
    model.mean, model.std = model.mean.cpu(), model.std.cpu()
    torch.testing.assert_close(there, at.augment(images, views, 32, model), rtol=0, atol=1e-2)


def test_a_real_lack_of_gpu_memory_halves_the_micro_batch_and_training_goes_on():
    model, device = on_gpu()
    data, flags = random_data(count=512, side=256, device="cuda"), quick_flags(NUM_EPOCHS=1, IMAGE_SIZE=224, BATCH_SIZE=256,
                                                                               GRADIENT_ACCUMULATION_STEPS=1)
    model.gradual = False  # all layers learn: 256 images take several gigabytes
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5e9 / torch.cuda.get_device_properties(device).total_memory)
    try:
        entry = at.train_epoch(model, data, 0, at.make_optimizer(model, flags), at.make_scaler(device, None), None, flags)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert model.micro_batch < 256 and entry["train_loss"] > 0 and entry["skipped_updates"] == 0
