"""Files that lie on the hub, and are put there: real commands against a server that plays it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import cvxq.transformers  # noqa: F401 - registers what loads an exported folder
import pytest
from click.testing import Result
from cvxq.card import DEFAULTS, base_of, conversion_command, model_card
from cvxq.errors import HubError
from cvxq.hub import HubFile, hub_file
from cvxq.modules import PackedLinear
from cvxq.summary import summarize
from cvxq_converter.options import ConversionOptions
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

Run = Callable[..., Result]
# of the hub client's own upload
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PROVENANCE = {
    "source": "someone/tiny",
    "options": {**DEFAULTS, "bits": 3.5, "tune": 60, "keep": ["*.k_proj"], "means": True},
    "versions": {"cvxq": "0.1.0"},
}
REPORT = {"kl": 0.04567, "kl_standard_error": 0.00123, "perplexity_increase": 0.0312}


@pytest.fixture
def told_file(make_file: Callable[..., Any], plain_tokenizer: dict[str, bytes]) -> Path:
    """Return a file that says how it was made."""
    said = {"provenance.json": PROVENANCE, "report.json": REPORT}
    parts = {name: json.dumps(value).encode() for name, value in said.items()}
    made = make_file("llama", files={**plain_tokenizer, **parts}, with_record=True)
    return Path(made.path)


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that makes a server the hub of the hub client: use_hub(url, offline)."""

    def use(url: str, offline: bool = False) -> None:
        settings = {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": offline,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    return use


@pytest.fixture
def run(hub: Any, use_hub: Callable[..., None], cvxq: Run) -> Run:
    """Return a function that runs a command whose hub is the server, or another, or offline."""

    def command(*words: object, url: str = hub.url, offline: bool = False) -> Result:
        use_hub(url, offline)
        return cvxq(*words)

    return command


def downloads(hub: Any) -> list[str]:
    return [line for line in hub.requests if line.startswith("GET ") and "/resolve/" in line]


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_file("someone/tiny") == HubFile("someone/tiny")
    assert hub_file("someone/tiny@v1") == HubFile("someone/tiny", "v1")
    assert hub_file("hf://someone/tiny/") == HubFile("someone/tiny")
    assert hub_file("hf://a/b@v1/c/d.cvxq") == HubFile("a/b", "v1", "c/d.cvxq")
    for path in ("model.cvxq", "folder/model.cvxq", "/a/b", "./a", "a/b/c", "../a/b"):
        assert hub_file(path) is None
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    assert hub_file("someone/tiny") is None
    assert hub_file("hf://someone/tiny") is not None
    for wrong in ("hf://tiny", "hf://", "hf:///a/b"):
        with pytest.raises(HubError, match="is not hf://user/repo"):
            hub_file(wrong)
    assert [HubFile("a/b").name, HubFile("a/b", None, "model.cvxq").name] == ["b", "b"]
    assert HubFile("a/b", None, "c/d.cvxq").name == "d"


def test_a_file_is_downloaded_once_and_runs_offline(hub: Any, run: Run, told_file: Path) -> None:
    hub.repositories["someone/tiny"] = {"README.md": b"", "model.cvxq": told_file.read_bytes()}
    words = ("generate", "someone/tiny", "abc", "--max-tokens", "5", "--temperature", "0")
    first = run(*words)
    assert first.exit_code == 0, first.stderr
    assert len(downloads(hub)) == 1
    assert run(*words).stdout == first.stdout == run("generate", told_file, *words[2:]).stdout
    asked = len(hub.requests)
    offline = run(*words, offline=True)
    assert (offline.exit_code, offline.stdout) == (0, first.stdout)
    assert len(hub.requests) == asked
    assert len(downloads(hub)) == 1


def test_every_command_takes_a_file_of_the_hub(
    hub: Any, run: Run, told_file: Path, tmp_path: Path
) -> None:
    hub.repositories["someone/tiny"] = {"model.cvxq": told_file.read_bytes()}
    text = tmp_path / "text.txt"
    text.write_text("abc def " * 20)
    for words in (
        ("inspect", "hf://someone/tiny"),
        ("verify", "hf://someone/tiny@v1/model.cvxq"),
        ("perplexity", "someone/tiny", "--text", text, "--context", "16"),
        ("export", "someone/tiny", tmp_path / "exported"),
    ):
        done = run(*words)
        assert done.exit_code == 0, done.stderr
    assert (tmp_path / "exported" / "model.cvxq").read_bytes() == told_file.read_bytes()


def test_a_download_that_breaks_off_goes_on(hub: Any, run: Run, told_file: Path) -> None:
    hub.repositories["someone/tiny"] = {"model.cvxq": told_file.read_bytes()}
    hub.cuts = 1
    done = run("verify", "someone/tiny")
    assert done.exit_code == 0, done.stderr
    assert len(downloads(hub)) == 2


def test_a_file_that_came_damaged_is_thrown_away(hub: Any, run: Run, told_file: Path) -> None:
    sound = told_file.read_bytes()
    hub.repositories["someone/tiny"] = {"model.cvxq": sound[:5000] + b"~" + sound[5001:]}
    done = run("generate", "someone/tiny", "abc")
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1
    assert "came damaged and was thrown away" in done.stderr
    hub.repositories["someone/tiny"] = {"model.cvxq": sound}
    assert run("verify", "someone/tiny").exit_code == 0


def test_what_the_hub_does_not_have_is_one_line(
    hub: Any, run: Run, told_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = told_file.read_bytes()
    hub.repositories["someone/many"] = {"a.cvxq": data, "b.cvxq": data}
    hub.repositories["someone/none"] = {"config.json": b"{}"}
    for name, message in (
        ("someone/many", "has several: a.cvxq, b.cvxq; name one"),
        ("someone/none", "has no .cvxq file"),
        ("someone/other", "the hub has no such model, or it is private"),
        ("hf://someone/many@v2", "no such revision"),
        ("hf://someone/many/c.cvxq", "no such file; check the spelling"),
        ("hf://someone/none/config.json", "a .cvxq file starts with"),
        ("folder/missing.cvxq", "does not exist"),
    ):
        done = run("verify", name)
        assert done.exit_code == 3, (name, done.stderr)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    gone = run("verify", "someone/many", url="http://127.0.0.1:9")
    assert "out of reach" in gone.stderr
    assert gone.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE" in run("verify", "someone/many", offline=True).stderr


def test_a_pushed_file_comes_back_and_transformers_loads_it(
    hub: Any, run: Run, told_file: Path
) -> None:
    done = run("push", told_file, "me/tiny-cvxq", "--private")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{hub.url}/me/tiny-cvxq\n"
    assert hub.private == {"me/tiny-cvxq"}
    files = hub.repositories["me/tiny-cvxq"]
    assert files["model.cvxq"] == told_file.read_bytes()
    assert {"config.json", "tokenizer.json", "unquantized.safetensors"} < files.keys()
    assert "model.safetensors" not in files
    card = files["README.md"].decode()
    assert "base_model: someone/tiny\n" in card
    assert "base_model_relation: quantized\n" in card
    assert "library_name: cvxq\n" in card
    assert "| KL to the original, nats per token | 0.0457 ± 0.0012 |" in card
    assert "| perplexity, against the original's | +3.1% |" in card
    command = "cvxq convert someone/tiny -o model.cvxq --bits 3.5 --keep '*.k_proj' --tune 60"
    assert command in card
    assert run("verify", "me/tiny-cvxq").exit_code == 0
    cache = told_file.parent / "second"
    network = AutoModelForCausalLM.from_pretrained("me/tiny-cvxq", cache_dir=cache)
    assert isinstance(network.lm_head, PackedLinear)


def test_a_card_that_somebody_wrote_stays(hub: Any, run: Run, told_file: Path) -> None:
    hub.repositories["me/tiny"] = {"README.md": b"# Mine\n"}
    done = run("push", told_file, "me/tiny")
    assert done.exit_code == 0, done.stderr
    assert "stays as it is" in done.stderr
    files = hub.repositories["me/tiny"]
    assert files["README.md"] == b"# Mine\n"
    assert files["model.cvxq"] == told_file.read_bytes()
    hub.repositories["me/tiny"]["README.md"] = (
        b"<!-- Written by `cvxq push`, which replaces it " + (b"unless this line is removed. -->\n")
    )
    assert run("push", told_file, "me/tiny").exit_code == 0
    assert b"# tiny" in hub.repositories["me/tiny"]["README.md"]


def test_what_cannot_be_pushed_is_one_line(hub: Any, run: Run, told_file: Path) -> None:
    assert "is not USER/REPO" in run("push", told_file, "tiny").stderr
    assert "does not exist" in run("push", "none.cvxq", "me/tiny").stderr
    refused = run("push", told_file, "me/tiny", offline=True)
    assert refused.exit_code == 3
    assert "HF_HUB_OFFLINE forbids" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_card_without_a_report_or_a_base(make_file: Callable[..., Any]) -> None:
    summary = summarize(make_file("llama").path)
    assert base_of(summary) is None
    card = model_card(summary, "me/tiny", None)
    assert "base_model" not in card
    assert "Made by" not in card
    assert "KL" not in card


def test_defaults_of_the_command_are_the_converters() -> None:
    made = ConversionOptions.of(bits=3).to_json()
    assert {name: made[name] for name in DEFAULTS} == {**DEFAULTS, "bits": 3}
    plain = "cvxq convert a/b -o model.cvxq"
    assert (
        conversion_command("a/b", {"max_kl": 0.05, "seed": 1}) == f"{plain} --max-kl 0.05 --seed 1"
    )
    assert conversion_command("a/b", {"size_bytes": 1200}) == f"{plain} --size 1200B"
    options = {"max_perplexity_increase": 0.01}
    assert conversion_command("a/b", options) == f"{plain} --max-perplexity-increase 1%"


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that is loaded")
def test_an_upload_that_is_killed_or_finds_no_room(
    hub: Any, told_file: Path, tmp_path: Path, runs: Callable[..., Any]
) -> None:
    """The repository has all of the file or nothing, and the next upload clears up."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
        "TMPDIR": str(scratch),
    }
    one, rng, killed = runs("push", told_file, "me/tiny", **environment), Random(5), 0
    whole = one("run")
    assert whole["code"] == 0, whole["said"]
    expected = hub.repositories.pop("me/tiny")
    for _ in range(20):
        killed += one("kill", rng.uniform(0, whole["seconds"]))["code"] == -9
        files = hub.repositories.pop("me/tiny", {})
        assert files.keys() in ({}.keys(), expected.keys())
        left = list(scratch.iterdir())
        assert len(left) <= 1, "what an earlier run left is still there"
        assert all(re.fullmatch(r"cvxq-push\.[0-9a-f]{8}\.unfinished", p.name) for p in left)
        for path in left:
            os.utime(path, (0, 0))  # an empty one could be just made, for a minute
    assert killed > 10
    full = one("limit", 100)
    assert (full["code"], full["said"].count("\n")) == (3, 1), full
    assert "File too large" in full["said"]
    assert not list(scratch.iterdir())
    assert not hub.repositories.get("me/tiny")
    assert one("run")["code"] == 0
    assert hub.repositories["me/tiny"].keys() == expected.keys()
    assert hub.repositories["me/tiny"]["model.cvxq"] == told_file.read_bytes()
    hub.repositories.pop("me/tiny")
    both = one("twice")
    assert (both["code"], both["other"]["code"]) == (0, 0), both
    assert hub.repositories["me/tiny"].keys() == expected.keys()
    assert not list(scratch.iterdir())
