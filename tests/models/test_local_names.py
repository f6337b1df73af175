"""Names: folders of this machine come first, and a mistyped path is an error before the hub is contacted."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from rmtension import RewardHead
from rmtension.errors import ModelError
from rmtension.models._checkpoint_names import find_local


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with checkpoints in it, and a hub that must not be asked."""
    for name in ("my-model", "runs/my-model", "runs/trained/checkpoint-100", "runs/trained/checkpoint-200"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "gpt3").mkdir()
    monkeypatch.chdir(tmp_path)

    def ask(*_, **__):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(transformers.utils, "cached_file", ask)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("my-modle", "my-model"),
        ("./my-modle", "my-model"),
        ("runs/my-modle", "runs/my-model"),
        ("rnus/my-model", "runs/my-model"),
        ("runs/trainde/checkpoint-100", "runs/trained/checkpoint-100"),
        (Path("my-modle"), "my-model"),
        (Path("runs/My-Model"), "runs/my-model"),
    ],
)
def test_a_mistyped_path_is_named(here, name, meant):
    with pytest.raises(ModelError, match=rf"there is no folder .* Did you mean '{meant}'\?"):
        RewardHead.from_pretrained(name)
    with pytest.raises(ModelError, match=rf"Did you mean '{here}/{meant}'\?"):
        RewardHead.from_pretrained(here / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/else", r"The folders in 'runs' are \['my-model', 'trained'\].*revision='main'"),
        ("nothing/at/all", "There is no folder 'nothing'"),
        ("/nothing/model", "There is no folder '/nothing'"),
        ("~/nothing-of-that-name-here/model", "There is no folder '.*nothing-of-that-name-here'"),
        ("my-model/config.json", "got the file .*Pass its folder, 'my-model'"),
        ("", "got an empty string"),
        ("gpt3", r"no config.json and no adapter_config.json. It contains \[\]"),
        (
            "runs/trained",
            r"the checkpoints \['checkpoint-100', 'checkpoint-200'\]; pass one of them, .*'runs/trained/check",
        ),
    ],
)
def test_errors_list_the_existing_folders(here, name, message):
    with pytest.raises(ModelError, match=message):
        RewardHead.from_pretrained(name)


@pytest.mark.parametrize("name", ["gpt2", "someone/some-model", "runs-of-others/my-model", "Skywork/Skywork-Reward"])
def test_hub_names_stay_hub_names(here, name):
    """Also if a folder without a checkpoint has a similar name."""
    assert find_local(name) == name


def test_a_revision_makes_it_a_hub_name(here):
    assert find_local("runs/my-modle", "main") == "runs/my-modle"
    with pytest.raises(ModelError, match="Did you mean"):
        find_local(Path("runs/my-modle"), "main")


def test_folders_are_found_in_every_spelling(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert find_local("~/my-model") == str(here / "my-model")
    assert find_local("my-model", "main") == "my-model"
    assert find_local(Path("runs") / "my-model") == "runs/my-model"


def test_a_folder_with_only_weights_is_refused(checkpoints, tmp_path):
    shutil.copy(checkpoints["gpt2"] / "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match=r"no config.json.*\['model.safetensors'\]: copy config.json"):
        RewardHead.from_pretrained(tmp_path)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoints["gpt2"] / file, tmp_path)
    assert RewardHead.from_pretrained(tmp_path).n_layers == 3


def test_a_folder_without_weights_is_refused(checkpoints, tmp_path):
    """The outermost folder of a training run, where the config was saved too."""
    shutil.copy(checkpoints["gpt2"] / "config.json", tmp_path)
    shutil.copytree(checkpoints["gpt2"], tmp_path / "checkpoint-7")
    with pytest.raises(ModelError, match=r"expected model.safetensors.*contains the checkpoints \['checkpoint-7'\]"):
        RewardHead.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors"):
        RewardHead.from_pretrained(tmp_path)
