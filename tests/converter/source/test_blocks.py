"""A network by blocks against the same network as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cvxq_converter.errors import ConversionError
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.blocks import Streamed, is_hollow
from cvxq_converter.source.checkpoint import load_network, open_source
from cvxq_converter.source.exactness import stream
from cvxq_converter.source.loaded import LoadedModel, load_model

Save = Callable[..., Path]
OPTIONS = ConversionOptions.of(bits=4.0)
MAPS = Path("/proc/self/maps")
SEQUENCES = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> LoadedModel:
    return load_model(open_source(str(folder)), OPTIONS)


def logits_by_blocks(streamed: Streamed) -> torch.Tensor:
    found = torch.full((*SEQUENCES.shape, 96), torch.nan)
    for s, part, logits in streamed.all_logits(SEQUENCES):
        found[s, part] = logits
    return found


@torch.no_grad()
def logits_of(network: Any) -> torch.Tensor:
    return torch.cat([network(row[None], use_cache=False).logits for row in SEQUENCES])


def test_logits_by_blocks_are_those_of_the_whole_network(
    architecture: str, save_network: Save
) -> None:
    folder = save_network(architecture)
    loaded = load(folder)
    assert len(loaded.streamed.blocks) == 2
    expected = logits_of(load_network(open_source(str(folder)), torch.float32))
    assert torch.equal(logits_by_blocks(loaded.streamed), expected)
    assert torch.equal(logits_of(loaded.network), expected)


def test_mixtures_run_by_blocks(
    family: str, build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    asks = family in ("Mixtral", "Qwen3Moe")  # for what only training needs
    build_mixture(family, **({"output_router_logits": True} if asks else {})).save_pretrained(
        tmp_path
    )
    loaded = load(tmp_path)
    assert len(loaded.streamed.blocks) == 2
    assert all(is_hollow(matrix.parameter) for matrix in loaded.matrices)
    expected = logits_of(load_network(open_source(str(tmp_path)), torch.float32))
    assert torch.equal(logits_by_blocks(loaded.streamed), expected)


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux tells what is mapped where")
@pytest.mark.parametrize("family", ["Mixtral", "GraniteMoe", "GptOss"])
def test_experts_stay_in_the_file(
    family: str, build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    build_mixture(family).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    mapped = [
        range(*(int(place, 16) for place in line.split()[0].split("-")))
        for line in MAPS.read_text().splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    experts = [matrix.name for matrix in loaded.matrices if matrix.pool is not None]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        place = loaded.originals[name].data_ptr()
        assert any(place in places for places in mapped)


def test_logits_come_a_few_positions_at_a_time(
    save_network: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(save_network("llama"))
    expected = logits_by_blocks(loaded.streamed)
    monkeypatch.setattr("cvxq_converter.source.blocks.LOGITS", 96 * 7)
    parts = [part for _, part, _ in loaded.streamed.all_logits(SEQUENCES)]
    assert parts == [slice(0, 7), slice(7, 14), slice(14, 20)] * 3
    torch.testing.assert_close(logits_by_blocks(loaded.streamed), expected, rtol=1e-5, atol=1e-5)


def test_matrices_are_in_memory_while_they_are_needed(save_network: Save) -> None:
    loaded = load(save_network("llama"))
    matrices = [matrix.parameter for matrix in loaded.matrices]
    assert all(is_hollow(parameter) for parameter in matrices)
    assert all(parameter.data.untyped_storage().nbytes() <= 8 for parameter in matrices)
    assert torch.isnan(loaded.hollow(SEQUENCES).logits).all()  # not silently something else
    seen: list[int] = []
    block = loaded.hollow.model.layers[1]
    hook = block.register_forward_hook(
        lambda *_: seen.append(sum(not is_hollow(parameter) for parameter in matrices))
    )
    logits_by_blocks(loaded.streamed)
    hook.remove()
    of_block = 7
    assert max(seen) == of_block + 2  # and table and head
    assert all(is_hollow(parameter) for parameter in matrices)
    with loaded.whole():
        assert not any(is_hollow(parameter) for parameter in matrices)
    assert all(is_hollow(parameter) for parameter in matrices)


def test_originals_stay_in_the_file_and_come_back(save_network: Save) -> None:
    folder = save_network("gpt2")
    loaded = load(folder)
    stored = load_network(open_source(str(folder)), torch.float32)
    loaded.replace(lambda matrix: torch.full(tuple(matrix.weight.shape), 0.5))
    for matrix in loaded.matrices:
        expected = stored.get_parameter(f"{matrix.module_name}.weight").data
        expected = expected.T if matrix.kind == "conv1d" else expected
        assert torch.equal(loaded.originals[matrix.name], expected)
        assert (loaded.network.get_parameter(f"{matrix.module_name}.weight") == 0.5).all()
    loaded.restore()
    assert torch.equal(logits_by_blocks(loaded.streamed), logits_of(stored))


def test_bfloat16_files_are_read_as_float32(save_network: Save, tmp_path: Path) -> None:
    network = load_network(open_source(str(save_network("llama-tied"))), torch.bfloat16)
    network.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.originals[loaded.matrices[0].name].dtype is torch.bfloat16
    assert torch.equal(logits_by_blocks(loaded.streamed), logits_of(network.float()))


def test_blocks_that_share_a_state_are_taken_as_one_piece(build_network: Any) -> None:
    network = build_network("llama")
    first, second = network.model.layers
    forward, remembered = type(second).forward, []

    def remember(hidden: torch.Tensor, **rest: Any) -> Any:
        remembered[:] = [hidden]
        return forward(first, hidden, **rest)

    def mix(hidden: torch.Tensor, **rest: Any) -> Any:
        return forward(second, hidden + remembered[0], **rest)

    first.forward, second.forward = remember, mix
    streamed = stream(network)
    assert streamed.blocks == []
    torch.testing.assert_close(logits_by_blocks(streamed), logits_of(network))


def test_a_network_without_an_output_layer_is_refused(build_network: Any) -> None:
    with pytest.raises(ConversionError, match="LlamaModel has no output layer"):
        stream(build_network("llama").model)
