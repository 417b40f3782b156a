"""The document checker finds what is wrong and accepts what is right."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import click
import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "check_documents.py"


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = spec_from_file_location("check_documents", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def program() -> click.Group:
    """A small command line: `cvxq [--loud] convert MODEL -o FILE [--bits R]`."""

    @click.group()
    @click.option("--loud", is_flag=True)
    def group(loud: bool) -> None: ...

    @group.command(help="Compress.")
    @click.argument("model")
    @click.option("-o", "output", required=True)
    @click.option("--bits", type=float)
    def convert(model: str, output: str, bits: float) -> None: ...

    return group


def found(checker: ModuleType, program: click.Group, tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "FORMAT.md").touch()
    file = tmp_path / "README.md"
    file.write_text(text)
    return list(checker.problems(file, program, {"test", "demo"}))


RIGHT = """
A [link](FORMAT.md), [one to a part](FORMAT.md#bits), [one outside](https://example.org).

```sh
make test PYTHON=python3.12      # a comment
cvxq convert folder -o out.cvxq --bits 3 2>log | tee out.txt
cvxq --loud convert folder \\
    -o "a file.cvxq"
ls -l
```

```console
$ cvxq convert --help
Usage: cvxq convert [OPTIONS] MODEL

  Compress.

Options:
  -o TEXT       [required]
  --bits FLOAT
  --help        Show this message and exit.
```

```python
>>> 1 + 1
2
```
"""


def test_a_right_document_has_no_problems(
    checker: ModuleType, program: click.Group, tmp_path: Path
) -> None:
    assert found(checker, program, tmp_path, RIGHT) == []


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("(FORMAT.md)", "(FORMATS.md)", "link to FORMATS.md: no such file"),
        ("make test", "make tests", "no target 'tests'"),
        ("convert folder -o out", "covnert folder -o out", "no command 'covnert'"),
        ("--bits 3 2>log", "--bit-rate 3 2>log", "No such option"),
        ("convert folder -o", "convert -o", "MODEL is missing"),
        ("folder -o out.cvxq", "folder", "-o is missing"),
        ("folder -o out.cvxq", "folder other -o out.cvxq", "unexpected argument 'other'"),
        ("  --bits FLOAT\n", "", "prints something else now"),
        (">>> 1 + 1", ">>> 1 + 2", "Got:"),
    ],
)
def test_each_kind_of_mistake_is_found(
    checker: ModuleType,
    program: click.Group,
    tmp_path: Path,
    right: str,
    wrong: str,
    problem: str,
) -> None:
    assert right in RIGHT
    problems = found(checker, program, tmp_path, RIGHT.replace(right, wrong))
    assert len(problems) == 1
    assert problem in problems[0]


def test_the_documents_of_this_repository_are_listed(checker: ModuleType) -> None:
    names = {file.name for file in checker.markdown_files()}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= names
