"""What `cvxq export` writes, loaded by transformers itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import cvxq
import cvxq.transformers
import pytest
import torch
from cvxq.errors import ArgumentError, MissingPartError, UnsupportedModelError
from cvxq.export import UNQUANTIZED_FILE, export
from cvxq.hub import MODEL_FILE
from cvxq.modules import packed_modules
from cvxq_kernels import cpu
from transformers import AutoModel, AutoModelForCausalLM

IDS = torch.arange(40).reshape(2, 20) * 7 % 96
TOLERANCE = 1e-5  # of log-probabilities: float32 sums in another order
CASES = (
    ("llama", {}),
    ("llama-tied", {}),
    ("gpt2", {}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("mixtral", {}),
    ("gpt-oss", {}),
    ("llama", {"add_biases": True}),
    ("gpt2", {"add_biases": True}),
)

MakeFile = Callable[..., Any]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


@pytest.fixture
def exported(make_file: MakeFile, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Return a function that makes a tiny model's file, and its folder."""

    def make(kind: str = "llama-tied", **options: Any) -> tuple[Any, Path]:
        made = make_file(kind, **options)
        folder = tmp_path / "folder"
        export(made.path, folder)
        return made, folder

    return make


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def log_probabilities(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits = network(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    found: torch.Tensor = logits.double().log_softmax(-1)
    return found


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_loaded_folder_is_the_file(
    kind: str, options: dict[str, Any], exported: Callable[..., tuple[Any, Path]]
) -> None:
    made, folder = exported(kind, **options)
    network = load(folder)
    cvxq.transformers.compute_exactly(network)
    expected = log_probabilities(made.network)
    assert expected.std() > 0.01  # else equality would say nothing
    assert (log_probabilities(network) - expected).abs().max() <= TOLERANCE
    with cvxq.load(made.path) as model:
        assert len(packed_modules(network)) == len(packed_modules(model.network)) > 0
        cvxq.transformers.compute_exactly(network, False)
        settings = cvxq.SamplingSettings(temperature=0)
        drawn = [*islice(model.session().draw(IDS[0].tolist(), settings), 12)]
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    generated = network.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options)
    assert generated[0, IDS.shape[1] :].tolist() == drawn
    network.tie_weights()
    assert generated.equal(
        network.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options)
    )


@pytest.mark.skipif(not cpu.is_available(), reason="needs the native library")
def test_exact_products_are_a_choice(exported: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = exported()
    network = load(folder)
    usual = log_probabilities(network)
    cvxq.transformers.compute_exactly(network)
    assert not log_probabilities(network).equal(usual)
    cvxq.transformers.compute_exactly(network, False)
    assert log_probabilities(network).equal(usual)


def test_transformers_alone_refuses_the_folder(exported: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = exported()
    code = f"""
import transformers
transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no file named model.safetensors" in done.stderr


def test_what_a_packed_model_cannot_do_is_said(
    exported: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    _, folder = exported()
    network = load(folder)
    with pytest.raises(ArgumentError, match="use cvxq export"):
        network.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)
    (folder / MODEL_FILE).unlink()
    with pytest.raises(MissingPartError, match=r"model\.cvxq does not exist"):
        load(folder)


def test_settings_of_the_caller_reach_the_network(
    exported: Callable[..., tuple[Any, Path]],
) -> None:
    _, folder = exported()
    network = load(folder, attn_implementation="eager", dtype=torch.bfloat16)
    assert network.config._attn_implementation == "eager"
    assert network.dtype == torch.float32  # the kernels of a CPU compute in no other
    assert network.model.config is network.config
    half = network.to(torch.bfloat16)
    assert log_probabilities(half).isfinite().all()


def test_device_maps(exported: Callable[..., tuple[Any, Path]]) -> None:
    pytest.importorskip("accelerate", reason="transformers wants it for any device_map")
    _, folder = exported()
    usual = log_probabilities(load(folder))
    for choice in ("cpu", {"": "cpu"}, "auto") if not torch.cuda.is_available() else ("cpu",):
        assert log_probabilities(load(folder, device_map=choice)).equal(usual)
    split = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": 0, "lm_head": "cpu"}
    with pytest.raises(ArgumentError, match="on one device, so give that one"):
        load(folder, device_map=split)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_loaded_folder_moves_to_a_device(exported: Callable[..., tuple[Any, Path]]) -> None:
    made, folder = exported()
    network = load(folder).to("cuda")
    with torch.inference_mode():
        logits = network(input_ids=IDS.cuda()).logits.cpu()
    found = logits.double().log_softmax(-1)
    assert (found - log_probabilities(made.network)).abs().max() <= 1e-3


def test_nothing_is_overwritten(make_file: MakeFile, tmp_path: Path) -> None:
    made = make_file("llama")
    folder = tmp_path / "folder"
    folder.mkdir()
    export(made.path, folder)  # an empty folder will do
    assert (folder / MODEL_FILE).samefile(made.path)
    modes = {(folder / name).stat().st_mode for name in ("config.json", UNQUANTIZED_FILE)}
    assert len(modes) == 1, "who may read the folder may read all of it"
    with pytest.raises(ArgumentError, match="is not an empty folder"):
        export(made.path, folder)
    other = make_file("llama", "other.cvxq", files={"tokenizer.json": b"{}"})
    other.path.write_bytes(other.path.read_bytes()[:-1])
    with pytest.raises(Exception, match="other"):
        export(other.path, tmp_path / "second")
    assert not [path for path in tmp_path.iterdir() if "second" in path.name]
