"""The commands in the documents are commands that exist: they parse, their targets, modules and endpoints are there."""

import importlib.util
import re
import shlex
from collections.abc import Iterator

import pytest

from services.cli.main import parse
from services.gateway.openapi import describe
from tests.pure.test_readme import DOCUMENTS, ROOT

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:ghostserve|make|python -m|curl|docker) [^`]+)`")
UNFINISHED = re.compile(r"[|…]|\bCOMMAND\b")
"""What says how commands look, rather than being one."""


def lines() -> Iterator[tuple[str, str]]:
    """Every command of every document: shell blocks line by line, continued lines joined, and inline code."""
    for document in DOCUMENTS:
        text = document.read_text()
        for block in BLOCK.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith((" ", "#")):
                    yield document.name, line
        for command in INLINE.findall(text):
            yield document.name, " ".join(command.split())


def words(line: str) -> list[str]:
    """A command's words, without comment, variables before it, and the environment's folder."""
    found = shlex.split(line, comments=True)
    while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
        found.pop(0)
    return [found[0].removeprefix(".venv/bin/"), *found[1:]] if found else []


def commands(program: str) -> list[tuple[str, list[str]]]:
    found = []
    for document, line in lines():
        if line.startswith(("-d ", "'", '"')) or UNFINISHED.search(line.split("#")[0]):
            continue
        try:
            parts = words(line)
        except ValueError:
            parts = []  # the first line of a text that goes on
        if parts and parts[0] == program:
            found.append((document, parts[1:]))
    return found


@pytest.mark.parametrize(("document", "arguments"), commands("ghostserve"), ids=str)
def test_a_ghostserve_command_parses(document: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code: object = 0
    try:
        parse(arguments)
    except SystemExit as ended:
        code = ended.code
    named_in_passing = "required: --url" in capsys.readouterr().err  # without its address
    assert not code or named_in_passing, f"{document}: ghostserve {' '.join(arguments)}"


def test_every_make_target_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {arguments[0] for _, arguments in commands("make")}
    assert named
    assert named <= targets


def test_every_module_is_there() -> None:
    modules = {arguments[1] for _, arguments in commands("python") if arguments[0] == "-m"}
    assert modules
    assert {module for module in modules if importlib.util.find_spec(module) is None} == set()


def test_every_endpoint_that_is_asked_is_there() -> None:
    words = {word for _, arguments in commands("curl") for word in arguments}
    asked = {"/" + match[1] for word in words if (match := re.fullmatch(r"(?:http://)?[\w.:]+/([\w/.]*)", word))}
    assert asked
    assert asked <= set(describe("", keys=False)["paths"])


def test_every_file_that_docker_is_given_is_there() -> None:
    given = {
        argument for _, arguments in commands("docker") for argument in arguments if argument.startswith("docker/")
    }
    assert given
    assert {name for name in given if not (ROOT / name).exists()} == set()
