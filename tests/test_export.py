"""What is handed over: one program that needs PyTorch alone, and a folder that timm loads."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, in_precision, quick_flags, random_data, run_of
from PIL import Image
from test_data import make_folder
from torch import nn

import advanced_techniques as at

NAMES = ("test_resnet", "test_vit")
SIZES = [(37, 37), (300, 401), (401, 300), (1, 1), (7, 1000), (1000, 3), (36, 35), (74, 37)]


def arguments(folder: Path, output: Path, **changes) -> list[str]:
    flags = dict(dataset=folder, architectures=",".join(NAMES), pretrained="none", image_size=32,
                 num_epochs=2, batch_size=16, gradient_accumulation_steps=1, output_dir=output,
                 data_dir=output.parent / "data", use_mixed_precision=False, export=True) | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_program_makes_squares_as_pillow_does(fit, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = np.asarray(at.squared(Image.fromarray(pixels), 37, fit))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    made = at.in_squares(images, 37, fit)[0].permute(1, 2, 0).numpy()
    # Images far higher than wide are resized down first by some versions of Pillow.
    assert np.abs(made - wanted).max() <= (1 if height > 10 * width else 0)


def test_padding_shows_all_of_an_image_with_grey_around_and_squashing_all_without():
    white = Image.new("RGB", (80, 40), "white")
    padded = np.asarray(at.squared(white, 20, "pad"))
    assert (padded[5:15] == 255).all() and (padded[:5] == 128).all() and (padded[15:] == 128).all()
    assert (np.asarray(at.squared(white, 20, "squash")) == 255).all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on photographs that are no squares, padded: its folder and OUTPUT_DIR."""
    place = tmp_path_factory.mktemp("run")
    folder = make_folder(place / "pets", count=20)
    random = np.random.default_rng(1)
    for file in folder.rglob("*.png"):
        image = Image.open(file).resize(tuple(random.integers(20, 90, 2)))
        image.save(file)
    at.main(arguments(folder, place / "out", fit="pad"))
    return folder, place / "out"


ALONE = """
import json, sys
sys.modules.update(dict.fromkeys(("timm", "torchvision", "advanced_techniques")))  # can't be had
import numpy as np, torch
from PIL import Image
extra = {"classes.json": "", "flags.json": "", "models.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
answers = {}
for path in sys.argv[2:]:
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    probabilities = program(pixels.permute(2, 0, 1)[None])
    assert not probabilities.requires_grad
    best = int(probabilities[0].argmax())
    answers[path] = [json.loads(extra["classes.json"])[best], float(probabilities[0, best])]
three = torch.randint(0, 256, (3, 3, 50, 20), dtype=torch.uint8)
one_by_one = torch.cat([program(image[None]) for image in three])
assert torch.allclose(program(three), one_by_one, atol=1e-6)
for size in ((1, 1), (1, 900), (900, 1), (2000, 2100)):
    sums = program(torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)).sum()
    assert abs(float(sums) - 1) < 1e-5
models = json.loads(extra["models.json"])
assert models["test_vit"]["architecture"] == "test_vit", models
print(json.dumps([answers, json.loads(extra["flags.json"])]))
"""


def test_the_program_answers_in_a_process_that_has_torch_alone_as_predict_does(trained, capsys):
    folder, output = trained
    at.main(["--predict", str(folder), "--output-dir", str(output)])
    with (output / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    paths = [row["path"] for row in rows]
    ended = subprocess.run([sys.executable, "-c", ALONE, str(output / "ensemble.pt2"), *paths],
                           capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-2000:]
    answers, flags = json.loads(ended.stdout)
    for row in rows:
        name, share = answers[row["path"]]
        assert name == row["class_1"]
        assert share == pytest.approx(float(row["probability_1"]), abs=1e-4)
    assert flags["FIT"] == "pad" and flags["ARCHITECTURES"] == list(NAMES)


def test_the_report_tells_what_the_test_images_proved(trained):
    _, output = trained
    results = json.loads((output / "results.json").read_text())
    made = results["export"]
    assert made["exact"] and made["images"] == results["dataset"]["test_images"]
    assert made["same_class"] == made["as_reported"] == made["images"]
    assert made["largest_difference"] < 1e-4 and made["bytes"] > 1000
    report = (output / "report.txt").read_text()
    assert report.count("Handing over\n------------") == 1
    assert "the same class for all" in " ".join(report.split())
    assert "Diagnosis" in report  # what stood there before is still there


TIMM = """
import sys, timm, torch
network = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
torch.save((network(torch.load(sys.argv[2])), network.pretrained_cfg), sys.argv[3])
"""


@pytest.mark.parametrize("name", NAMES)
def test_timm_loads_each_network_with_its_classes_in_a_fresh_process(name, trained, tmp_path):
    _, output = trained
    images = torch.rand(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    folder = output / "models" / name
    ended = subprocess.run([sys.executable, "-c", TIMM, str(folder), tmp_path / "images.pt",
                            tmp_path / "answers.pt"], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr[-2000:]
    answers, settings = torch.load(tmp_path / "answers.pt", weights_only=False)
    saved = torch.load(output / "checkpoints" / f"{name}.pt", weights_only=True)
    flags = at.read_flags(["--image-size", "32"])
    network = at.new_network(name, 3, flags)
    network.load_state_dict(saved["state_dict"])
    torch.testing.assert_close(answers, network.eval()(images))
    described = json.loads((folder / "config.json").read_text())
    assert settings["crop_mode"] == "border" and settings["crop_pct"] == 1.0  # FIT is "pad"
    assert described["label_names"] == ["cat", "dog", "owl"] and described["num_classes"] == 3
    mean = at.timm.get_pretrained_cfg(name).mean
    assert tuple(settings["mean"]) == mean and tuple(settings["input_size"]) == (3, 32, 32)


def small_job(tmp_path: Path, precision: torch.dtype | None = None, **changes) -> at.Job:
    """A job with one tested model and its checkpoint, as far as handing over looks at it."""
    run, data = run_of("test_resnet", OUTPUT_DIR=str(tmp_path), EXPORT=True,
                       ARCHITECTURES=("test_resnet",), NUM_EPOCHS=1, **changes), random_data()
    if precision:
        run = in_precision(run, precision)
    at.train_model(run, data)
    answers = at.predict(run, data, "test", at.tta_views(run.flags))
    tested = at.judge_model(run, data, answers, 1.0)
    job = at.Job(run.flags, CPU, data, tested=[tested])
    at.finish(run, data, tested, True)
    return job


def test_a_run_in_sixteen_bits_is_compared_with_its_models_in_fp32(tmp_path, capsys):
    job = small_job(tmp_path, torch.bfloat16)
    at.report(job)
    printed = " ".join(capsys.readouterr().out.split())
    made = json.loads((tmp_path / "results.json").read_text())["export"]
    assert not made["exact"] and made["same_class"] == made["images"] == 10
    assert made["largest_difference"] < 1e-5
    assert "in FP32 on a CPU" in printed and "This run itself names the same class" in printed


def test_a_program_that_answers_otherwise_is_not_praised(tmp_path, capsys, monkeypatch):
    job = small_job(tmp_path)
    make = at.HandedOver.forward
    monkeypatch.setattr(at.HandedOver, "forward", lambda self, images: make(self, images).flip(1))
    at.report(job)
    made = json.loads((tmp_path / "results.json").read_text())["export"]
    assert made["same_class"] < 10 and made["largest_difference"] > 1e-3
    printed = " ".join(capsys.readouterr().out.split())
    assert "the same class for all" not in printed and "DOES NOT answer the 10 test" in printed


def test_probabilities_apart_are_not_praised_either(tmp_path, capsys, monkeypatch):
    job = small_job(tmp_path)
    make = at.HandedOver.forward
    monkeypatch.setattr(at.HandedOver, "forward", lambda self, images: make(self, images) * 0.999)
    at.report(job)
    made = json.loads((tmp_path / "results.json").read_text())["export"]
    assert made["same_class"] == 10 and made["largest_difference"] > 1e-4
    assert "DOES NOT answer the 10 test" in " ".join(capsys.readouterr().out.split())


def test_the_temperature_is_inside(tmp_path):
    run, data = run_of("test_resnet", OUTPUT_DIR=str(tmp_path)), random_data()
    images = data.images[data.split["test"]]
    run.network.eval()
    with torch.no_grad():
        plain = at.HandedOver([run], 36, 1.0)(images)
        sharp = at.HandedOver([run], 36, 0.5)(images)
    torch.testing.assert_close(sharp, at.at_temperature(plain, 0.5), check_dtype=False)
    assert (sharp.amax(1) > plain.amax(1)).all()


@pytest.mark.parametrize("changes", [dict(horizontal_flip=False, compile=True),
                                     dict(use_ensemble=False, use_tta=False)])
def test_the_program_follows_the_flags(changes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(at.nn.Module, "compile", lambda self: None)  # minutes, else
    at.main(arguments(make_folder(tmp_path / "pets", count=12), tmp_path / "out", **changes))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    made = results["export"]
    assert made["same_class"] == made["images"] == results["dataset"]["test_images"]
    assert made["largest_difference"] < 1e-5


def test_photographs_at_their_own_size_are_answered_as_by_the_run(tmp_path):
    """A JPEG that is far larger than what the networks see, as cameras make them."""
    folder = make_folder(tmp_path / "pets", count=12)
    random = np.random.default_rng(0)
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        pixels = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        large = Image.fromarray(pixels).resize((480, 360 + number % 3), Image.BICUBIC)
        grain = random.integers(-100, 101, (360 + number % 3, 480, 1))  # detail of single pixels
        photograph = Image.fromarray((np.asarray(large) + grain).clip(0, 255).astype(np.uint8))
        photograph.save(file.with_suffix(".jpg"), quality=92)
        file.unlink()
    at.main(arguments(folder, tmp_path / "out", architectures="test_resnet"))
    made = json.loads((tmp_path / "out" / "results.json").read_text())["export"]
    assert made["originals"] == made["originals_same_class"] == made["images"]
    assert made["originals_largest_difference"] < 1e-4
    report = " ".join((tmp_path / "out" / "report.txt").read_text().split())
    assert f"Given {made['images']} of them as they are in their files" in report
    program = torch.export.load(tmp_path / "out" / "ensemble.pt2").module()
    with (tmp_path / "out" / "test_predictions.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):  # as anyone would read the file
            pixels = torch.from_numpy(np.array(Image.open(row["image"]).convert("RGB")))
            share = program(pixels.permute(2, 0, 1)[None]).max()
            assert float(share) == pytest.approx(float(row["probability"]), abs=1e-4)


def test_originals_that_are_gone_or_too_large_are_left_out(tmp_path, monkeypatch):
    data = random_data()
    test = data.split["test"].tolist()
    data.files = [tmp_path / f"{index}.png" for index in range(len(data.images))]
    for index in test[1:]:
        pixels = data.images[index].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(data.files[index])
    Image.new("RGB", (60, 60)).save(data.files[test[1]])
    monkeypatch.setattr(at, "LARGEST_ORIGINAL", 3 * 36 * 36)
    wanted = torch.eye(4)[torch.arange(len(test)) % 4]

    def program(images):
        (place,) = [place for place, index in enumerate(test)
                    if images.shape[-1] == 36 and torch.equal(data.images[index], images[0])]
        return wanted[place][None]

    found = at.try_originals(program, wanted, data)
    assert found["originals"] == found["originals_same_class"] == len(test) - 2
    assert found["originals_largest_difference"] == 0

    def refusing(images):
        raise RuntimeError("a guard on the width")

    with pytest.raises(RuntimeError, match="guard"):  # such a program isn't handed over
        at.try_originals(refusing, wanted, data)


def test_no_network_of_an_earlier_run_is_left_beside_the_ones_of_this(tmp_path):
    older, own = tmp_path / "models" / "resnet50", tmp_path / "models" / "bert"
    for folder in (older, own):
        folder.mkdir(parents=True)
        for name in (*at.TIMM_FILES, "notes.txt"):
            (folder / name).write_text("older")
    job = at.Job(quick_flags(ARCHITECTURES=("test_vit",), OUTPUT_DIR=str(tmp_path)), CPU)
    at.remove_older(job)  # no run is known to have written them
    (tmp_path / "results.json").write_text(json.dumps(dict(export=None)))
    at.remove_older(job)
    assert len(list(older.iterdir())) == len(list(own.iterdir())) == 3
    (tmp_path / "results.json").write_text(json.dumps(dict(export=dict(in_models=["resnet50"]))))
    at.remove_older(job)
    assert [file.name for file in older.iterdir()] == ["notes.txt"]
    assert len(list(own.iterdir())) == 3


def test_weights_to_begin_with_may_not_lie_where_models_are_handed_over(tmp_path, capsys):
    weights = tmp_path / "outputs" / "models" / "resnet18"
    weights.mkdir(parents=True)
    flags = quick_flags(PRETRAINED=str(weights), OUTPUT_DIR=str(tmp_path / "outputs"))
    for export in (True, False):  # a report removes an earlier run's models either way
        flags.EXPORT = export
        with pytest.raises(SystemExit):
            at.check_places(flags)
        message = capsys.readouterr().err
        assert "PRETRAINED" in message and "--output-dir" in message
    flags.OUTPUT_DIR = str(tmp_path / "other")
    at.check_places(flags)
    flags.PRETRAINED = "auto"
    at.check_places(flags)


def break_export(monkeypatch, tmp_path):
    class Branches(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    build = at.stored_run

    def with_branch(*arguments):
        run = build(*arguments)
        run.network = nn.Sequential(Branches(), run.network)
        return run

    monkeypatch.setattr(at, "stored_run", with_branch)
    monkeypatch.setattr(at, "write_model", lambda *arguments: None)


def fill_disk(monkeypatch, tmp_path):
    write = at.write_whole

    def refuse(file, work):
        if file.name == "ensemble.pt2":
            at.stop(f"{file} can't be written (No space left on device).")
        write(file, work)

    monkeypatch.setattr(at, "write_whole", refuse)


@pytest.mark.parametrize("trouble", [break_export, fill_disk])
def test_what_can_not_be_exported_is_said_and_costs_nothing_else(trouble, tmp_path, capsys,
                                                                monkeypatch):
    job = small_job(tmp_path)
    (tmp_path / "ensemble.pt2").write_bytes(b"an older run's")
    trouble(monkeypatch, tmp_path)
    at.report(job)
    printed = " ".join(capsys.readouterr().out.split())
    assert "ensemble.pt2 was not made" in printed and "Traceback" not in printed
    assert "Written to" in printed and not (tmp_path / "ensemble.pt2").exists()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["export"]["file"] is None and results["models"][0]["test_accuracy"] is not None


def test_a_network_that_timm_can_not_describe_costs_its_folder_only(tmp_path, capsys, monkeypatch):
    job = small_job(tmp_path)

    def refuse(network, folder, **_):
        Path(folder, "model.safetensors").write_bytes(b"half of it")
        raise ValueError("it can't be described")

    monkeypatch.setattr(at.timm.models, "save_for_hf", refuse)
    (tmp_path / "models" / "test_resnet").mkdir(parents=True)
    at.report(job)
    printed = " ".join(capsys.readouterr().out.split())
    assert "models/test_resnet was not written" in printed and "it can't be described" in printed
    assert (tmp_path / "ensemble.pt2").is_file() and "the same class for all" in printed
    assert not (tmp_path / "models" / "test_resnet" / "model.safetensors").exists()
    assert "models/ holds" not in printed


def test_a_disk_that_stays_full_costs_no_report(tmp_path, capsys, monkeypatch):
    job = small_job(tmp_path)

    def fill(*_):
        def refuse(file, work):
            at.stop(f"{file} can't be written (No space left on device).")
        monkeypatch.setattr(at, "write_whole", refuse)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(at, "write_model", fill)
    at.report(job)
    printed = " ".join(capsys.readouterr().out.split())
    assert "ensemble.pt2 was not made" in printed and "No space left" in printed
    assert "Diagnosis" in (tmp_path / "report.txt").read_text()


def test_a_program_that_was_not_tried_to_the_end_is_not_left(tmp_path, monkeypatch):
    job = small_job(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(at, "try_program", interrupt)
    with pytest.raises(KeyboardInterrupt):
        at.report(job)
    assert not (tmp_path / "ensemble.pt2").exists()
    assert at.handed_over_before(tmp_path) == ["test_resnet"]  # a later run can clear these away


def test_what_an_older_run_left_does_not_stay_beside_another_run(tmp_path):
    job = small_job(tmp_path)
    at.report(job)
    left = ["ensemble.pt2", "test_predictions.csv", "train_labels.csv",
            "models/test_resnet/config.json", "models/test_resnet/model.safetensors",
            "confusion_matrix.png"]
    assert all((tmp_path / name).is_file() for name in left)
    (tmp_path / "models" / "mine.txt").write_text("a user's own")
    unfinished = at.Job(job.flags, CPU, job.data)
    at.report(unfinished)
    assert not any((tmp_path / name).exists() for name in left)
    assert (tmp_path / "models" / "mine.txt").is_file()


def test_a_stand_in_is_named_as_what_it_is(tmp_path, capsys):
    job = small_job(tmp_path)
    job.tested[0].entry.update(stands_in_for="resnet18", architecture="tf_efficientnet_lite0")
    stood_in = "holds EfficientNet-Lite0, which stood in for resnet18"
    for written in ([], ["test_resnet"]):
        lines = at.handing_over_lines(dict(models=[job.tested[0].entry], export=dict(
            file=None, why="", in_models=written, not_for_timm={})))
        assert (stood_in in " ".join(lines)) == bool(written)


def test_nothing_is_exported_where_it_is_switched_off_or_the_run_not_finished(tmp_path, capsys):
    job = small_job(tmp_path)
    (tmp_path / "ensemble.pt2").write_bytes(b"an older run's")
    job.flags.EXPORT = False
    at.report(job)
    job.flags.EXPORT = True
    job.flags.ARCHITECTURES = ("test_resnet", "test_vit")  # one is still to come
    at.report(job)
    assert not (tmp_path / "ensemble.pt2").exists() and "Handing" not in capsys.readouterr().out


@pytest.mark.parametrize(("fit", "least", "most"), [("crop", 0.2, 0.8), ("pad", 0.95, 1.0),
                                                    ("squash", 0.95, 1.0)])
def test_what_lies_at_the_edge_of_wide_images_is_seen_unless_it_is_cropped(fit, least, most,
                                                                          tmp_path):
    random = np.random.default_rng(0)
    for label, name in enumerate(("left", "right")):
        (tmp_path / "marks" / name).mkdir(parents=True)
        for number in range(40):
            pixels = random.integers(0, 80, (24, 72, 3), dtype=np.uint8)
            edge = slice(0, 4) if label == 0 else slice(68, 72)
            pixels[6:18, edge] = (255, 200, 0)
            Image.fromarray(pixels).save(tmp_path / "marks" / name / f"{number}.png")
    at.main(arguments(tmp_path / "marks", tmp_path / "out", fit=fit, architectures="test_resnet",
                      num_epochs=12, horizontal_flip=False, export=False))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert least <= results["models"][0]["test_accuracy"] <= most


def test_a_fit_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        at.read_flags(["--fit", "padd"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "FIT = padd" in message and "Did you mean pad?" in message


def test_flags_of_a_run_decide_how_predict_makes_squares(trained, monkeypatch):
    folder, output = trained
    seen = set()
    squared = at.squared

    def note(image, side, fit):
        seen.add(fit)
        return squared(image, side, fit)

    monkeypatch.setattr(at, "squared", note)
    at.main(["--predict", str(folder), "--output-dir", str(output)])
    assert seen == {"pad"}
    assert at.decode(next(folder.rglob("*.png")), 16).shape == (3, 16, 16) and "crop" in seen
    assert quick_flags().FIT == "crop"
