"""What a network may do to the weights and to CIFAR-10, tried against a stand-in hub."""

import errno
import os
import resource
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CPU, quick_flags, random_data
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load, save
from standin_hub import StandIn, dropping_url, refusing_url

import advanced_techniques as at

FILES = {"test_resnet": "timm/test_resnet.r160_in1k", "test_vit": "timm/test_vit.r160_in1k"}


def weights_of(name: str, share: float = 1.0, **options) -> bytes:
    """A file of weights for a network, or of the first share of its tensors."""
    torch.manual_seed(5)
    state = timm.create_model(name, **options).state_dict()
    return save(dict(list(state.items())[:round(share * len(state))]))


@pytest.fixture(scope="module")
def genuine() -> dict[str, bytes]:
    return {name: weights_of(name) for name in FILES}


@pytest.fixture
def hub(monkeypatch, tmp_path, genuine):
    """A hub with the files of two small networks, the client turned to it, and little patience."""
    files = {f"{FILES[name]}/model.safetensors": content for name, content in genuine.items()}
    standin = StandIn(files)
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    turn_to(standin.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for name, seconds in dict(ANSWER_SECONDS=0.4, STALL_SECONDS=1.2, SPEAK_SECONDS=0.5).items():
        monkeypatch.setattr(at, name, seconds)
    yield standin
    standin.close()
    close_session()


def turn_to(url: str, monkeypatch) -> None:
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def search(*names: str, **changes) -> list[at.Weights]:
    return at.find_all_weights(quick_flags(ARCHITECTURES=names or tuple(FILES), **changes))


def is_genuine(weights: at.Weights, genuine: dict[str, bytes]) -> bool:
    """Whether a network built from the weights holds the hub's, all of them but the head's."""
    name = weights.architecture
    job = at.Job(quick_flags(IMAGE_SIZE=160), CPU, random_data())
    network = at.new_run(name, weights, 0, job).network
    held, expected = network.state_dict(), load(genuine[name])
    head = timm.get_pretrained_cfg(name).classifier
    body = [key for key in held if not key.startswith(head + ".")]
    same = [torch.equal(held[key], expected[key]) for key in body]
    return weights.stands_in_for is None and len(body) > 20 and all(same)


def stands_in(weights: at.Weights, name: str) -> bool:
    return (weights.architecture, weights.stands_in_for) == (at.STAND_IN, name) and weights.trained


@pytest.mark.parametrize("xet", [False, True], ids=["plain", "xet offered"])
def test_weights_are_downloaded_once_and_the_second_run_asks_nobody(hub, genuine, xet, capsys):
    hub.xet = xet
    found = search()
    assert all(is_genuine(weights, genuine) for weights in found) and at.weight_notices(found) == []
    assert "downloaded" in found[0].origin and FILES["test_vit"] in capsys.readouterr().out
    assert hub.count("GET file /cdn") == 2 and hub.count("store") == 0
    asked = hub.count()
    again = search()
    assert hub.count() == asked
    assert all(is_genuine(weights, genuine) for weights in again) and "cached" in again[0].origin


REFUSED = {
    "missing file": "answered 404 Not Found for", "404": "answered 404 Not Found for",
    "missing repository": "answered 401 Unauthorized for", "gated": "only to accounts",
    "403": "answered 403 Forbidden for", "429": "answered 429 Too Many Requests for",
    "429 in an hour": "answered 429 Too Many Requests for",
    "500": "answered 500 Internal Server Error for", "503": "answered 503 Service Unavailable for",
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("victim", FILES)
def test_a_refusal_costs_one_model_its_weights_and_says_whose(hub, genuine, fault, victim):
    hub.order("lookup", victim, fault)
    started = time.monotonic()
    found = dict(zip(FILES, search(), strict=True))
    assert time.monotonic() - started < 5
    (notice,) = at.weight_notices(list(found.values()))
    assert REFUSED[fault] in notice and "reached" not in notice
    assert f"STANDS IN for {victim}," in notice
    for name, weights in found.items():
        assert stands_in(weights, name) if name == victim else is_genuine(weights, genuine)
    assert hub.count(f"lookup /timm/{victim}") == 1 + (fault == "missing file")


@pytest.mark.parametrize("fault", ["empty page", "portal", "no HTTP", "reset", "closed", "silent"])
def test_what_is_no_hub_is_asked_once(hub, fault):
    hub.order("lookup", "", fault)
    found = search()
    assert all(stands_in(weights, name) for weights, name in zip(found, FILES, strict=True))
    (notice,) = at.weight_notices(found)
    said = f"What answers at {hub.url} is not the model hub"
    if fault not in ("empty page", "portal"):
        said = f"The model hub {hub.url} can't be reached"
    assert notice.startswith(said) and hub.count() == 1
    assert "STANDS IN for test_resnet, test_vit" in notice


def test_a_refused_connection_and_dropped_packets_and_a_dead_proxy(hub, monkeypatch):
    with dropping_url() as dropping:
        for url in (refusing_url(), dropping):
            turn_to(url, monkeypatch)
            started = time.monotonic()
            (notice,) = at.weight_notices(search())
            assert f"{url} can't be reached" in notice and time.monotonic() - started < 5
    turn_to(hub.url, monkeypatch)
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(variable, refusing_url())
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    close_session()
    (notice,) = at.weight_notices(search())
    assert f"{hub.url} can't be reached" in notice and hub.count() == 0


def test_a_mistyped_proxy_costs_no_more_than_the_download(monkeypatch, tmp_path):
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http:/proxy:3128")
    monkeypatch.setattr(urllib.request, "_opener", None)  # made once, with the proxies of then
    trouble = at.fetch_archive("http://example.org/cifar.tar.gz", tmp_path / "cifar.tar.gz", "0")
    assert trouble.startswith("http://example.org can't be reached (") and "proxy" in trouble


def test_offline_only_the_cache_is_looked_at(hub, genuine, monkeypatch):
    search("test_vit")
    asked = hub.count()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    resnet, vit = search()
    assert hub.count() == asked and is_genuine(vit, genuine) and stands_in(resnet, "test_resnet")
    assert "HF_HUB_OFFLINE is set" in at.weight_notices([resnet, vit])[0]


BREAKS = ["reset", "closed", "reset midway", "closed midway", "truncated", "damaged"]


@pytest.mark.parametrize("fault", BREAKS)
def test_a_download_that_breaks_once_is_repeated(hub, genuine, fault):
    hub.order("file", "test_vit", fault, times=1)
    (found,) = search("test_vit")
    assert is_genuine(found, genuine) and at.weight_notices([found]) == []


BROKEN = {
    "403": "answered 403", "503": "answered 503", "reset": "broke off", "reset midway": "broke off",
    "empty page": "broke off", "portal": "broke off", "truncated": "broke off",
    "damaged": "arrived damaged", "no HTTP": "stopped sending", "silent": "stopped sending",
    "silent midway": "stopped sending", "429 in an hour": "stopped sending",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_download_that_never_succeeds_ends_in_the_stand_in(hub, fault, capfd):
    hub.order("file", "", fault)
    started = time.monotonic()
    found = search("test_vit")
    seconds = time.monotonic() - started
    output = "".join(capfd.readouterr())
    (notice,) = at.weight_notices(found)
    assert stands_in(found[0], "test_vit") and BROKEN[fault] in notice and "test_vit" in notice
    assert seconds < 6 and "Traceback" not in output and "Retrying" not in output
    if BROKEN[fault] == "stopped sending":
        assert "Still waiting for the weights of test_vit" in output


def test_a_hub_that_has_stopped_sending_is_not_asked_for_more(hub):
    hub.order("file", "", "silent midway")
    (notice,) = at.weight_notices(search())
    assert "STANDS IN for test_resnet, test_vit" in notice and hub.count("test_vit") == 0


def test_a_slow_download_is_waited_for_with_one_line(hub, genuine, capfd):
    hub.pause = 0.3  # twice as long in all as a download may stand still
    hub.order("file", "", "slow")
    (found,) = search("test_vit")
    output, errors = capfd.readouterr()
    assert is_genuine(found, genuine)
    assert output.count("Downloading the weights of test_vit (1.5 MB)") == 1
    assert "Still waiting" not in output and errors == ""


def test_on_a_terminal_a_slow_download_shows_its_progress(hub, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    hub.pause = 0.3
    hub.order("file", "", "slow")
    search("test_vit")
    assert "the weights of test_vit: " in capfd.readouterr().err


STRANGE = ["another network", "half of the tensors", "another head", "no weights"]


@pytest.mark.parametrize("other", STRANGE)
def test_a_file_that_does_not_fit_its_network_is_never_used(hub, genuine, other):
    contents = {"another network": genuine["test_resnet"], "no weights": b"<html>" * 1000,
                "half of the tensors": weights_of("test_vit", 0.5),
                "another head": weights_of("test_vit", num_classes=10)}
    hub.files[f"{FILES['test_vit']}/model.safetensors"] = contents[other]
    found = search("test_vit")
    assert stands_in(found[0], "test_vit")
    assert "file for test_vit doesn't hold its weights" in at.weight_notices(found)[0]


def test_a_damaged_file_in_the_cache_is_set_aside_and_fetched_again(hub, genuine, tmp_path):
    search("test_vit")
    (blob,) = (tmp_path / "hub").rglob("blobs/*")
    content = bytearray(blob.read_bytes())
    content[-1000] ^= 1
    blob.write_bytes(content)
    (found,) = search("test_vit")
    (notice,) = at.weight_notices([found])
    assert is_genuine(found, genuine) and "set aside" in notice and "fetched again" in notice
    assert blob.read_bytes() == genuine["test_vit"]
    assert blob.with_name(blob.name + ".damaged").read_bytes() == content
    blob.write_bytes(content)
    hub.order("lookup", "", "503")
    (found,) = search("test_vit")
    assert stands_in(found, "test_vit")
    assert "set aside" in found.notice and "503" in found.notice


def test_a_cache_that_cannot_be_written_or_is_full_is_said(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    (found,) = search("test_vit")
    assert stands_in(found, "test_vit") and "can't take the weights of test_vit" in found.notice
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "full"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # no file grows beyond
    try:
        (found,) = search("test_vit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stands_in(found, "test_vit") and "can't take the weights of test_vit" in found.notice


def test_a_name_without_weights_on_the_hub_is_told_so(hub):
    found = search("convnext_atto_rms")
    (notice,) = at.weight_notices(found)
    assert notice.startswith("The model hub has no weights for convnext_atto_rms: ")
    assert "reached" not in notice and hub.count() == 0


def test_the_second_name_of_a_file_is_tried(hub, genuine, tmp_path):
    torch.manual_seed(5)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "file")
    del hub.files[f"{FILES['test_vit']}/model.safetensors"]
    hub.files[f"{FILES['test_vit']}/pytorch_model.bin"] = (tmp_path / "file").read_bytes()
    (found,) = search("test_vit")
    assert is_genuine(found, genuine)


@pytest.mark.parametrize("classes", [1000, 7, 0])
def test_given_files_may_have_any_head(tmp_path, genuine, classes):
    (tmp_path / "test_vit.safetensors").write_bytes(weights_of("test_vit", num_classes=classes))
    (found,) = search("test_vit", PRETRAINED=str(tmp_path))
    assert found.trained and found.stands_in_for is None


@pytest.mark.parametrize("kind", ["half", "another network", "truncated", "empty"])
def test_given_files_that_do_not_fit_are_refused(tmp_path, genuine, kind, capsys):
    contents = {"half": weights_of("test_vit", 0.9), "another network": genuine["test_resnet"],
                "truncated": genuine["test_vit"][:100_000], "empty": b""}
    file = tmp_path / "test_vit.safetensors"
    file.write_bytes(contents[kind])
    with pytest.raises(SystemExit) as stopped:
        search("test_vit", PRETRAINED=str(file))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and str(file) in message and message.count("\n") == 1


# ---- CIFAR-10 ----


@pytest.fixture
def host(hub, cifar_server, monkeypatch, tmp_path):
    """The same stand-in with CIFAR-10's archive in small; Fashion-MNIST is nowhere."""
    hub.files["cifar"] = (tmp_path / "served" / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(at.torchvision.datasets.CIFAR10, "url", f"{hub.url}/archive/cifar")
    real = at.fashion_mnist

    def nowhere(folder, download):
        return real(folder, download, packed=tmp_path / "nowhere")

    monkeypatch.setattr(at, "fashion_mnist", nowhere)
    return hub


def choose(tmp_path, **changes):
    flags = quick_flags(DATA_DIR=str(tmp_path / "data"), **changes)
    name, notice = at.settle_dataset(flags)
    return at.load_source(name, flags).name, notice


def test_cifar10_is_downloaded_quietly_once(host, tmp_path, capfd):
    name, notice = choose(tmp_path, DATASET="cifar10")
    output, errors = capfd.readouterr()
    assert name == "CIFAR-10" and "was downloaded" in notice
    assert errors == "" and output.count("\n") == 1
    asked = host.count()
    assert "was found" in choose(tmp_path, DATASET="auto")[1] and host.count() == asked


@pytest.mark.parametrize("fault", BREAKS)
def test_a_cifar10_download_that_breaks_once_is_repeated(host, tmp_path, fault):
    host.order("archive", "GET", fault, times=1)
    assert choose(tmp_path, DATASET="cifar10")[0] == "CIFAR-10"


TROUBLES = {
    "403": "answered 403 Forbidden", "404": "answered 404 Not Found", "503": "answered 503",
    "429 in an hour": "answered 429", "empty page": "checksum", "portal": "checksum",
    "no HTTP": "can't be reached", "reset": "can't be reached", "closed": "can't be reached",
    "silent": "can't be reached", "reset midway": "broke off", "closed midway": "checksum",
    "truncated": "checksum", "damaged": "checksum", "silent midway": "stopped sending",
}


@pytest.mark.parametrize("fault", TROUBLES)
def test_without_cifar10_auto_takes_what_is_here_and_says_why(host, tmp_path, fault, capfd):
    host.order("archive", "", fault)
    started = time.monotonic()
    name, notice = choose(tmp_path, DATASET="auto")
    assert time.monotonic() - started < 5
    assert name == "shapes" and TROUBLES[fault] in notice
    assert "built-in shapes take its place" in notice
    assert "Traceback" not in "".join(capfd.readouterr())
    with pytest.raises(SystemExit) as stopped:
        choose(tmp_path, DATASET="cifar10")
    message = capfd.readouterr().err
    assert stopped.value.code == 2 and TROUBLES[fault] in message and "DATASET" in message


def test_a_damaged_archive_or_folder_is_recovered_from(host, tmp_path):
    choose(tmp_path, DATASET="cifar10")
    asked = host.count()
    batch = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:1000])
    name, notice = choose(tmp_path, DATASET="cifar10")
    assert name == "CIFAR-10" and "unpacked" in notice
    assert host.count() == asked  # the archive is whole
    batch.unlink()
    archive = tmp_path / "data" / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:2000])
    name, notice = choose(tmp_path, DATASET="cifar10")
    assert name == "CIFAR-10" and "downloaded" in notice and host.count() > asked


@pytest.mark.skipif(not at.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's copy")
def test_a_damaged_folder_of_fashion_mnist_is_unpacked_again(tmp_path, capsys):
    whole = at.fashion_mnist(tmp_path, download=False)
    damaged = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    again = at.fashion_mnist(tmp_path, download=False)
    chosen = np.array([0, 59_999, 69_999])
    assert torch.equal(again.read(chosen), whole.read(chosen))
    assert damaged.with_name(f"{damaged.name}.damaged").stat().st_size == 1000
    assert "set aside" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "blamed"), [
    (ssl.SSLError(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC]"), False),
    (ssl.SSLSyscallError(5, "EOF occurred in violation of protocol"), False),
    (OSError(errno.EHOSTUNREACH, "No route to host"), False),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False),
    (OSError(errno.ENOSPC, "No space left on device"), True),
    (PermissionError(errno.EACCES, "Permission denied"), True),
    (PermissionError(errno.EPERM, "Operation not permitted"), True),
])
def test_the_folder_is_blamed_for_its_own_troubles_alone(error, blamed):
    said = at.archive_trouble("host", Path("data/archive.gz"), error, "host broke off")
    assert ("data/ can't take archive.gz" in said) == blamed
    assert ("host broke off (" in said) != blamed


def test_a_data_folder_that_cannot_be_written_is_said(host, tmp_path):
    (tmp_path / "data").write_text("no folder")
    name, notice = choose(tmp_path, DATASET="auto")
    assert name == "shapes" and "can't take" in notice


# ---- the whole script ----


def train(hub, folder: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    small = dict(dataset="shapes", architectures="test_vit", image_size=32, train_images=40,
                 test_images=20, batch_size=8, gradient_accumulation_steps=2, num_epochs=1,
                 export=False,
                 output_dir=folder / "outputs", data_dir=folder / "data")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    home = str(folder / "home")
    environment = os.environ | dict(HF_ENDPOINT=hub.url, HF_HOME=home, OMP_NUM_THREADS="1")
    command = [sys.executable, *launcher, at.__file__, *flags, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_script_itself_downloads_and_then_asks_nobody(hub, tmp_path):
    hub.order("file", "/cdn", "closed", times=1)  # the client tries again, and has nothing to say
    ended = train(hub, tmp_path)
    assert ended.returncode == 0 and "Error while downloading" not in ended.stderr, ended.stderr
    assert "ImageNet weights timm/test_vit" in ended.stdout
    asked = hub.count("lookup") + hub.count("file /cdn")
    ended = train(hub, tmp_path)
    assert ended.returncode == 0 and "(cached)" in ended.stdout
    assert hub.count("lookup") + hub.count("file /cdn") == asked


def test_a_stop_of_the_first_process_is_told_to_the_others(monkeypatch):
    sent = []

    def gather(told, own):
        sent.append(own)
        told[:] = [own or SystemExit(2), None]

    monkeypatch.setattr(at, "PROCESSES", 2)
    monkeypatch.setattr(at.distributed, "all_gather_object", gather)
    for rank in (0, 1):
        monkeypatch.setattr(at, "RANK", rank)
        monkeypatch.setattr(at, "LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            at.from_each_machine(lambda: at.stop("as ordered"))
        with pytest.raises(SystemExit), at.first_on_each_machine():
            assert rank == 0, "the second process went ahead"
            at.stop("as ordered")
    assert [type(own) for own in sent] == [SystemExit, SystemExit, type(None), type(None)]


def test_several_processes_download_once_and_stop_with_one_message(hub, tmp_path):
    ended = train(hub, tmp_path, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert hub.count("GET file /cdn") == 1 and hub.count("HEAD lookup") == 2
    (tmp_path / "empty").mkdir()
    started = time.monotonic()
    ended = train(hub, tmp_path, f"--pretrained={tmp_path / 'empty'}", processes=2)
    assert ended.returncode != 0 and time.monotonic() - started < 30
    assert ended.stderr.count("advanced_techniques.py: PRETRAINED") == 1
    assert "Gloo" not in ended.stderr and 'advanced_techniques.py", line' not in ended.stderr
