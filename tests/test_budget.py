"""The script's size and shape: who adds a line past the limit takes another one out."""

import ast
import re

import pytest
from conftest import SCRIPT

import advanced_techniques as at

LIMIT = 3_715
TEXT = SCRIPT.read_text("utf-8")
NODES = list(ast.walk(ast.parse(TEXT)))
TITLES = re.findall(r"^# ==== ([^:=]+?)(?::.*| =+)$", TEXT, re.MULTILINE)
NUMBERED = dict(re.findall(r"(\d) ([^,]+)", ", ".join(TITLES)))


def defined() -> list[ast.FunctionDef]:
    """The functions of the file and the methods of its classes."""
    places = [node for node in NODES if isinstance(node, ast.Module | ast.ClassDef)]
    nested = [child for place in places for child in place.body]
    return [node for node in nested if isinstance(node, ast.FunctionDef)]


def test_the_script_keeps_to_its_budget():
    lines = TEXT.splitlines()
    assert len(lines) <= LIMIT
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("node", defined(), ids=lambda node: node.name)
def test_a_function_says_what_it_does_and_is_small(node):
    assert ast.get_docstring(node)
    taken = [one for one in ast.walk(node.args) if isinstance(one, ast.arg) and one.arg != "self"]
    assert len(taken) <= 5 and node.end_lineno - node.lineno < 50


def test_the_map_names_the_parts_that_are_there_in_order():
    drawn = at.__doc__.partition("A map of this file.")[2].partition("\n\n")[2]
    assert " ".join(drawn.split()).split(" | ") == TITLES and len(set(TITLES)) == len(TITLES) > 20


def test_techniques_have_one_numbering_everywhere():
    assert list(NUMBERED) == list("1234567")
    flags = {}
    for name, number in re.findall(r"^([A-Z_]+) = .*  # technique (\d)", TEXT, re.MULTILINE):
        flags[number] = name
    assert list(flags) == [number for number in NUMBERED if number in flags] and len(flags) == 7
    for name, (number, switch_off) in at.TECHNIQUES.items():
        off = switch_off(at.read_flags())
        assert NUMBERED[str(number)].lower() == name and flags[str(number)] in off
    assert [number for number, _ in at.TECHNIQUES.values()] == [2, 3, 4, 5, 6]
