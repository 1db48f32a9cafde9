"""Files are thin views of dataclasses: everything is applied or refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest

from dovetail.config import ConfigError, build, dump, load
from dovetail.settings import PRESETS, ModelSettings, Settings


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "steps: 7\ncorpus: [a, b]\nmodel:\n  layers: 3\noptimizer: {learning_rate: 1}\n"),
        ("run.toml", 'steps = 7\ncorpus = ["a", "b"]\n[model]\nlayers = 3\n[optimizer]\nlearning_rate = 1\n'),
        ("run.json", '{"steps": 7, "corpus": ["a", "b"], "model": {"layers": 3}, "optimizer": {"learning_rate": 1}}'),
    ],
)
def test_three_formats_mean_the_same(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    settings = load(Settings, path)
    assert settings == Settings(
        steps=7,
        corpus=(Path("a"), Path("b")),
        model=ModelSettings(layers=3),
        optimizer=dataclasses.replace(Settings().optimizer, learning_rate=1.0),
    )


@pytest.mark.parametrize("settings", list(PRESETS.values()), ids=list(PRESETS))
def test_dump_and_build_are_inverse_through_json(settings):
    """Breaks when a resumed run would read other settings than it wrote."""
    assert build(Settings, json.loads(json.dumps(dump(settings)))) == settings


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("stepz: 3", r"unknown key 'stepz'; did you mean 'steps'"),
        ("model: {layer: 3}", r"run.yaml.model: unknown key 'layer'; did you mean 'layers'"),
        ("steps: many", r"'many' is no int"),
        ("steps: 2.5", r"2.5 is no int"),
        ("steps: true", r"True is no int"),
        ("model: 3", r"expected a mapping"),
        ("- 1", r"expected a mapping"),
        ("steps: 0", r"steps=0; expected at least 1"),
        ("a: [", r"malformed"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, match):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        load(Settings, path)


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(Settings, tmp_path / "absent.yaml")
    (tmp_path / "run.ini").write_text("steps=3")
    with pytest.raises(ConfigError, match=r"expected .yaml, .toml or .json"):
        load(Settings, tmp_path / "run.ini")
