"""COMPILE without a working compiler is refused before training."""

import pytest
import torch
import torch._inductor.config
from conftest import CPU

import advanced_techniques as at


def test_without_a_compiler_compile_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys):
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before is found
    # torch's own patch: what pytest puts back stays hidden from every later test of this process.
    absent = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with absent, pytest.raises(SystemExit) as stopped:
        at.check_compiler(CPU)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "--compile false" in message and message.count("\n") == 1


@pytest.mark.parametrize("wanted", [True, False])
def test_the_compiler_is_tried_only_where_it_is_wanted(wanted, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(at, "check_compiler", tried.append)
    arguments = [f"--compile={wanted}", "--architectures=test_resnet", "--dataset=shapes",
                 f"--output-dir={tmp_path}", "--image-size=32"]
    at.prepare(at.Job(at.read_flags(arguments), CPU))
    assert tried == [CPU] * wanted
