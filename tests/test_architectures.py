"""The architectures' table: sizes and speeds are measured, and "best for" follows from them."""

import pytest
import torch
from conftest import quick_flags, random_data, run_of

import advanced_techniques as at


@pytest.mark.parametrize(
    ("name", "millions", "multiply_adds"),  # published, in 10^9
    [("resnet18", 11.7, 1.82), ("resnet50", 25.6, 4.1), ("efficientnet_b0", 5.3, 0.39)],
)
def test_parameters_and_operations_are_the_published_ones(name, millions, multiply_adds):
    found = at.count_operations(name, 1000, quick_flags(IMAGE_SIZE=224))
    assert found["parameters"] / 1e6 == pytest.approx(millions, rel=0.01)
    assert found["gflop"] == pytest.approx(2 * multiply_adds, rel=0.05)


def test_where_another_stood_in_the_architecture_itself_is_measured(monkeypatch):
    timed, answered = [], []

    def record(run, data, precision, micro_batch):
        timed.append((run.network, run.flags, precision, micro_batch))
        return 50.0, None

    def record_answers(run, data):
        answered.append(run.network)
        return 100.0

    monkeypatch.setattr(at, "measure_update", record)
    monkeypatch.setattr(at, "inference_speed", record_answers)
    run = run_of("test_resnet")
    found = at.measure_architecture(run, random_data())
    assert timed[0][0] is run.network and answered[0] is run.network
    assert found["name"] == "test_resnet"

    run.weights = at.Weights("test_resnet", "", {}, "resnet18")
    found = at.measure_architecture(run, random_data())
    network, flags, precision, micro_batch = timed[1]
    assert found["name"] == "resnet18" and isinstance(network, at.timm.models.ResNet)
    assert answered[1] is network and at.count_parameters(network) == found["parameters"] > 11e6
    assert network.num_features == 512 and precision is None and micro_batch == 8
    assert flags.GRADIENT_ACCUMULATION_STEPS == 1 and run.flags.GRADIENT_ACCUMULATION_STEPS == 2
    assert found["training_images_per_second"] == 50
    assert found["inference_images_per_second"] == 100


def test_an_update_is_timed_with_all_layers_its_median_taken_and_its_own_memory(monkeypatch):
    clock, learning, watched = iter([99.0, 100.0, 5.0, 1.0, 9.0]), [], []
    memory_of = at.memory_of

    def watch(work, device):
        taken = memory_of(work, device)
        watched.append(len(learning))
        return taken

    monkeypatch.setattr(at, "memory_of", watch)

    def timed(work, device):
        work()
        learning.append(all(weight.requires_grad for weight in run.network.parameters()))
        return next(clock)

    monkeypatch.setattr(at, "seconds_of", timed)
    run, data = run_of("test_resnet", BATCH_SIZE=10), random_data()
    speed, memory = at.measure_update(run, data, None, 10)
    assert speed == 20 / 5.0 and learning == [True] * 5
    assert watched == [2]  # the first one lacks AdamW's averages until its activations are gone
    assert memory > 3 * 4 * at.count_parameters(run.network)  # gradients, averages, activations
    clock = iter([1.0] * 5)
    assert at.measure_update(run, data, None, 5)[1] < memory


def test_speeds_are_those_of_the_clock(monkeypatch):
    clock = []

    def two_seconds(work, device):
        work()
        clock.append(1)
        return 2.0

    monkeypatch.setattr(at, "seconds_of", two_seconds)
    run, data = run_of("test_resnet", BATCH_SIZE=4), random_data()
    found = at.measure_architecture(run, data)
    assert found["training_images_per_second"] == 2.0  # 4 images of an update
    assert found["inference_images_per_second"] == 4.0  # 8 of the 10 test images
    assert len(clock) == 9 and len(data.split["test"]) == 10


def entry(name, parameters, training, accuracy, seconds, trained=None):
    return dict(name=name, parameters=parameters, gflop=1.0, training_images_per_second=training,
                inference_images_per_second=1000 - training, accuracy=accuracy, seconds=seconds,
                trained=trained or name, best_for=[], pretrained=True)


def test_what_an_architecture_is_best_for_follows_from_the_figures():
    small = entry("small", 1, 50.0, 0.80, 100.0)
    fast = entry("fast", 2, 90.0, 0.78, 80.0)
    accurate = entry("accurate", 3, 20.0, 0.95, 300.0, trained="tf_efficientnet_lite2")
    at.name_strengths([small, fast, accurate])
    assert small["best_for"] == ["smallest"]
    assert fast["best_for"] == ["fastest to train"]
    # 0.05 x 300 is less than 0.22 x 80 and 0.20 x 100.
    assert accurate["best_for"] == ["fastest to answer", "most accurate",
                                    "best accuracy for its time"]

    table = at.architectures_table(dict(architectures=[small, fast, accurate], flags=at.FLAGS))
    (row,) = [line for line in table if line.startswith("accurate ")]
    assert "95.0%*" in row and row.endswith("most accurate*, best accuracy for its time*")
    assert "78.0% " in table[2] and table[2].endswith("fastest to train")
    assert table[-1].endswith("EfficientNet-Lite2 for accurate.")
    # The real one won against a stand-in, which says little of what that stands in for.
    pair = [entry("real", 1, 50.0, 0.9, 10.0),
            entry("b", 2, 40.0, 0.8, 10.0, trained="tf_efficientnet_lite0")]
    at.name_strengths(pair)
    table = at.architectures_table(dict(architectures=pair, flags=at.FLAGS))
    assert table[1].endswith("most accurate*, best accuracy for its time*")


def test_seeds_of_one_stand_in_are_not_compared_as_architectures():
    same = [entry(name, size, 50.0, accuracy, 10.0, trained="tf_efficientnet_lite0")
            for name, size, accuracy in (("a", 1, 0.9), ("b", 2, 0.8))]
    at.name_strengths(same)
    assert same[0]["best_for"] == ["smallest", "fastest to train", "fastest to answer"]
    assert same[1]["best_for"] == ["fastest to train", "fastest to answer"]


def test_accuracies_with_and_without_imagenet_s_weights_are_not_compared():
    pretrained, random = entry("one", 1, 50.0, 0.9, 100.0), entry("two", 2, 40.0, 0.5, 100.0)
    random["pretrained"] = False
    at.name_strengths([pretrained, random])
    assert pretrained["best_for"] == ["smallest", "fastest to train"]
    assert random["best_for"] == ["fastest to answer"]
    table = at.architectures_table(dict(architectures=[pretrained, random], flags=at.FLAGS))
    assert "for its time" not in " ".join(table)


def test_equal_architectures_share_what_they_are_best_for():
    pair = [entry("one", 1, 50.0, 0.8, 100.0), entry("other", 1, 40.0, 0.8, 100.0)]
    at.name_strengths(pair)
    shared = ["smallest", "most accurate", "best accuracy for its time"]
    assert pair[0]["best_for"] == [shared[0], "fastest to train", *shared[1:]]
    assert pair[1]["best_for"] == [shared[0], "fastest to answer", *shared[1:]]


def finished(name, accuracy, architecture, measured=True):
    figures = dict(name=name, parameters=5, gflop=1.0, training_images_per_second=1.0,
                   inference_images_per_second=1.0)
    model = dict(tta_accuracy=accuracy, test_accuracy=0.1, seconds=3.0, architecture=architecture)
    return at.Tested(model, torch.zeros(0), architecture=figures if measured else None)


def test_each_architecture_is_compared_once_by_what_the_run_answers():
    flags = quick_flags()
    models = [finished("resnet18", 0.8, "tf_efficientnet_lite0"), finished("a", 0.9, "a"),
              finished("a", 0.7, "a"), finished("older", 0.99, "older", measured=False)]
    stood_in, own = at.compare_architectures(models, flags)
    assert (stood_in["name"], stood_in["trained"]) == ("resnet18", "tf_efficientnet_lite0")
    assert (own["name"], own["accuracy"], stood_in["accuracy"]) == ("a", 0.9, 0.8)
    assert "most accurate" in own["best_for"]
    (alone,) = at.compare_architectures(models[1:3], flags)
    assert alone["best_for"] == []  # of one, nothing can be said
    assert at.architectures_table(dict(architectures=[])) == []


def test_a_finished_model_keeps_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(at, "measure_speed", lambda run, data: {})
    monkeypatch.setattr(at, "measure_architecture", lambda run, data: dict(name="measured"))
    run, data = run_of("test_resnet", OUTPUT_DIR=str(tmp_path), NUM_EPOCHS=1), random_data()
    assert at.train_and_test(run, data).architecture == dict(name="measured")
    run.flags.RESUME = True
    assert at.resume(run, data).architecture == dict(name="measured")
