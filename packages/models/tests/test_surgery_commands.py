"""If these fail, surgery on the command line writes another model than the functions make, or half of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from surgery_toys import flat, made, same

from dovetail_models import (
    from_pretrained,
    merge_models,
    output_norms,
    prune_heads,
    prune_hidden,
    prune_layers,
    repeat_layers,
    resize_vocabulary,
    save_pretrained,
    strongest,
)
from dovetail_models.surgery_commands import Merge, Prune, Resize, Upscale
from dovetail_protocols import CommandError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one family, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    models = [made("gemma3"), made("gemma3", 1), made("qwen3")]
    return [save_pretrained(model, folder / str(i)) for i, model in enumerate(models)]


def _pruned(a: Any) -> Any:
    model = prune_layers(a, [1])
    model = prune_heads(model, strongest(output_norms(model, "heads"), 1))
    return prune_hidden(model, strongest(output_norms(model, "hidden"), 5))


COMMANDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "upscale": (
        lambda a, b, **to: Upscale(source=str(a), ranges=("0:2", "1", "0:1"), zero=True, **to),
        lambda a, b: repeat_layers(a, [0, 1, 1, 0], zero=True),
    ),
    "prune": (
        lambda a, b, **to: Prune(source=str(a), layers=(1,), kv_heads=1, hidden=5, **to),
        lambda a, b: _pruned(a),
    ),
    "resize": (
        lambda a, b, **to: Resize(source=str(a), size=25, multiple_of=8, spread=0.1, seed=3, **to),
        lambda a, b: resize_vocabulary(a, 25, multiple_of=8, spread=0.1, seed=3),
    ),
    "merge": (
        lambda a, b, **to: Merge(sources=(str(a), str(b)), weights=(0.2, 0.8), method="slerp", **to),
        lambda a, b: merge_models([a, b], weights=[0.2, 0.8], method="slerp"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_write_what_functions_make(
    name: str, folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, function = COMMANDS[name]
    command(*folders[:2], destination=tmp_path / "made").run()
    same(from_pretrained(tmp_path / "made"), function(made("gemma3"), made("gemma3", 1)))
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'made'}: ")
    with pytest.raises(CommandError, match="made exists; pass overwrite=True"):
        command(*folders[:2], destination=tmp_path / "made").run()
    command(*folders[:2], destination=tmp_path / "made", overwrite=True, dtype="bfloat16", max_shard_bytes=500).run()
    assert json.loads((tmp_path / "made/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 1


def test_ties_and_dare(folders: list[Path], tmp_path: Path) -> None:
    for method in ("ties", "dare"):
        to = tmp_path / method
        Merge(
            sources=(str(folders[0]),), base=str(folders[1]), method=method, density=0.5, scale=0.5, destination=to
        ).run()
        expected = merge_models([made("gemma3")], base=made("gemma3", 1), method=method, density=0.5, scale=0.5)
        for address, value in flat(from_pretrained(to)).items():
            np.testing.assert_array_equal(value, flat(expected)[address])


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (Upscale, {"ranges": ("0:2", "1:x")}, "ranges: '1:x'; expected two numbers such as 0:24"),
    (Upscale, {"ranges": ("2:2",)}, "ranges: '2:2' holds no layer"),
    (Upscale, {"ranges": ("-1",)}, "ranges: '-1'"),
    (Upscale, {"ranges": ("0:3",)}, r"order: \[0, 1, 2\]; expected at least one, each from 0 to 1"),
    (Upscale, {"ranges": ("1:2", "0:1"), "zero": True}, "does not begin as it was"),
    (Prune, {}, "nothing to prune; pass --layers, --kv-heads or --hidden"),
    (Prune, {"layers": (0, 0)}, "at most once"),
    (Prune, {"kv_heads": 3}, "count=3"),
    (Resize, {"size": 3}, "pass shrink=True"),
    (Merge, {"sources": ("0", "2")}, "Gemma3Config .0., Qwen3Config .1."),
    (Merge, {"sources": ("0", "nowhere")}, "nowhere"),
    (Merge, {"sources": ("0", "1"), "weights": (1.0,)}, "each of 2 models"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_bad_input_is_a_command_error(
    kind: Any, options: dict[str, Any], message: str, folders: list[Path], tmp_path: Path
) -> None:
    """One that the command line prints, and nothing is written."""
    if "sources" in options:
        options = options | {"sources": tuple(str(folders[0].parent / name) for name in options["sources"])}
    else:
        options = options | {"source": str(folders[0])}
    with pytest.raises(CommandError, match=message):
        kind(destination=tmp_path / "made", **options).run()
    assert not list(tmp_path.iterdir())
