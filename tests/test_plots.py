"""The plots: class names of every kind, and a plot that fails costs nothing else."""

import dataclasses
import json
import warnings
from pathlib import Path

import matplotlib.font_manager
import pytest
import torch
from conftest import random_data
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from test_data import make_folder

import advanced_techniques as at

SMALL = ["--architectures=test_resnet", "--pretrained=none", "--image-size=32", "--num-epochs=1",
         "--batch-size=8", "--gradient-accumulation-steps=1"]
AWKWARD = ("$x", "a$b$", "$\\frac{1$", "cat_1^2", "猫", "นก", "x" * 200, "ends  ", "%d {0}")


def make_font(file: Path, name: str, characters: str) -> None:
    """A font whose only glyphs are full squares for the characters."""
    builder = FontBuilder(1000, isTTF=True)
    order = [".notdef", *(f"glyph{ord(character)}" for character in characters)]
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(character): f"glyph{ord(character)}"
                               for character in characters})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys(order, square))
    builder.setupHorizontalMetrics(dict.fromkeys(order, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable(dict(familyName=name, styleName="Regular"))
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(file)


def texts(figure: at.Figure) -> list[str]:
    """All that a figure shows as text, as matplotlib puts it on the page."""
    found = []
    for text in figure.findobj(matplotlib.text.Text):
        shown, is_math = text._preprocess_math(text.get_text())
        assert is_math in (False, "TeX") or "mathdefault" in shown, shown
        found.append(shown)
    return found


def answers(data: at.Data) -> torch.Tensor:
    """Probabilities of the test images that are wrong for each of them."""
    wrong = (data.truth("test") + 1) % len(data.classes)
    return torch.nn.functional.one_hot(wrong, len(data.classes)).double()


def class_figures(data: at.Data) -> list[at.Figure]:
    """The plots that show class names."""
    labels = data.truth("test")
    final = answers(data)
    return [at.plot_confusion(final, labels, data.classes),
            at.plot_classes(at.by_class(final, labels, data.classes)),
            at.plot_predictions(final, data)]


def test_a_dollar_is_a_letter_like_any_other(tmp_path):
    data = random_data(count=200)
    data.classes = ["$x", "a$b$", "$\\frac{1$", "back\\$slash"]
    for number, figure in enumerate(class_figures(data)):
        figure.savefig(tmp_path / f"{number}.png")
        shown = " ".join(texts(figure))
        assert all(name in shown for name in data.classes)


def test_long_names_are_shortened_in_the_middle_and_titles_wrapped(tmp_path):
    data = random_data(count=200)
    data.classes = ["x" * 100 + "1", "x" * 100 + "2", "line\nbreak", "c"]
    for number, figure in enumerate(class_figures(data)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as: no room is left for the axes
            figure.savefig(tmp_path / f"{number}.png")
        names = " ".join(texts(figure))
        assert "x" * 40 not in names and "x1" in names and "x2" in names
        title = figure._suptitle.get_window_extent()
        assert title.x0 >= 0 and title.x1 <= figure.bbox.x1


def test_very_many_classes_are_drawn(tmp_path):
    data = random_data(count=8000, side=8, classes=1000)
    for number, figure in enumerate(class_figures(data)):
        figure.savefig(tmp_path / f"{number}.png")
        assert figure.bbox.x1 < 2000 and figure.bbox.y1 < 2000


def test_a_font_is_found_by_the_characters_that_it_has(tmp_path, monkeypatch):
    make_font(tmp_path / "squares.ttf", "Test Squares", "猫犬")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    files = [str(tmp_path / "broken.ttf"), str(tmp_path / "squares.ttf")]
    monkeypatch.setattr(matplotlib.font_manager.fontManager, "ttflist",
                        list(matplotlib.font_manager.fontManager.ttflist))
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: files)
    data = dataclasses.replace(random_data(), classes=["猫", "cat"], indices=None)
    data.files = [Path("犬 and cat.png")] * len(data.images)  # of which captions show the names
    families, notice = at.find_fonts(at.plot_texts(data))
    assert families[-1] == "Test Squares" and notice == ""
    data = random_data(count=200)
    data.classes = ["猫", "犬", "cat", "dog"]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing is warned of
        for number, figure in enumerate(class_figures(data)):
            figure.savefig(tmp_path / f"{number}.png")


@pytest.mark.parametrize(("name", "font"), [("\U00020000", "Noto Sans CJK"), ("𐎀", "Ugaritic"),
                                            ("\U0001fae0", "Noto Emoji")])
def test_a_font_that_is_missing_is_named(name, font, monkeypatch):
    monkeypatch.setattr(at, "installed_fonts", list)
    families, notice = at.find_fonts(["cat", name])
    assert families == matplotlib.rcParams["font.family"]
    assert name in notice and font in notice and "cat" not in notice


def test_what_every_font_has_needs_no_search(monkeypatch):
    monkeypatch.setattr(at, "installed_fonts", lambda: pytest.fail("fonts were searched"))
    assert at.find_fonts(["cat", "café", "кот", "line\nbreak"])[1] == ""


def test_a_run_with_awkward_class_names_has_all_its_plots(tmp_path, capsys):
    make_folder(tmp_path / "pets", classes=AWKWARD)
    at.main([*SMALL, f"--dataset={tmp_path / 'pets'}", f"--output-dir={tmp_path / 'out'}",
             f"--data-dir={tmp_path / 'data'}"])
    output = capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 6 and "could not be drawn" not in output
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["dataset"]["classes"]
               ) == set(AWKWARD)
    known = at.find_fonts(list(AWKWARD))[1]
    assert known in (tmp_path / "out" / "report.txt").read_text()


@pytest.mark.parametrize("failing", ["plot_rates", "plot_confusion", "save"])
def test_a_plot_that_fails_costs_nothing_else(failing, tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "pets")
    saved, savefig = [], at.Figure.savefig

    def fail(*arguments, **options):
        raise ValueError("no such glyph")

    def fail_once(figure, stream, **options):
        saved.append(1)
        stream.write(b"half of it")
        return fail() if len(saved) == 2 else savefig(figure, stream, **options)

    if failing == "save":
        monkeypatch.setattr(at.Figure, "savefig", fail_once)
    else:
        monkeypatch.setattr(at, failing, fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "confusion_matrix.png").write_bytes(b"of an older run")
    at.main([*SMALL, f"--dataset={tmp_path / 'pets'}", f"--output-dir={tmp_path / 'out'}",
             f"--data-dir={tmp_path / 'data'}"])
    output = capsys.readouterr().out
    left_out = dict(plot_rates="learning_rates", plot_confusion="confusion_matrix",
                    save="training_curves")[failing]
    assert f"{left_out}.png could not be drawn (ValueError: no such glyph)" in output
    assert "5 plots" in output and (tmp_path / "out" / "report.txt").is_file()
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "out" / f"{left_out}.png").exists()
