"""Where a model's files come from: folders, a Hub that answers or does not, the local cache; and what identifies it."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Repo
from safetensors.torch import load_file, save_file

from dictionary_learning.model import BUILT_IN, load_model, load_tokenizer, model_identity, model_shape
from dictionary_learning.network import _say_offline

NAME = "alice/tiny"


@pytest.fixture
def model_on_the_hub(server, tiny_model_folder):
    files = {path.name: path.read_bytes() for path in tiny_model_folder.iterdir()}
    server.repos[NAME] = Repo(private=False, files=files, commits=["the model"])
    return server


@pytest.fixture
def model_folder(tiny_model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.mark.parametrize("revision", [None, "main"])
@pytest.mark.parametrize("how", ["fails", "is gone"])
def test_a_cached_model_needs_no_hub_and_waits_for_none(how, revision, model_on_the_hub, out_of_reach, capsys):
    _say_offline.cache_clear()
    first = load_model(NAME, revision=revision)
    identity = model_identity(NAME, revision)
    assert identity == {"id": NAME, "commit": model_on_the_hub.repos[NAME].head}
    for marks in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob(".no_exist"):
        shutil.rmtree(marks)  # as after `hf download`: the cache does not know which files there are not
    out_of_reach(how)
    model_on_the_hub.requests.clear()
    again = load_model(NAME, revision=revision)
    assert model_on_the_hub.requests == ([("HEAD", "/")] if how == "fails" else [])
    for name, parameter in first.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter)
    assert load_tokenizer(NAME, revision)("In 2023").input_ids == first.tokenizer("In 2023").input_ids
    assert model_shape(NAME, revision=revision).n_layers == 4
    assert model_identity(NAME, revision) == identity
    assert capsys.readouterr().err.count("the Hub cannot be reached: alice/tiny is looked for in the local cache") == 1


@pytest.mark.parametrize("how", ["fails", "is gone"])
def test_a_model_out_of_reach_is_one_sentence_at_once(how, out_of_reach):
    out_of_reach(how)
    message = "cannot load 'alice/tiny': the Hub cannot be reached, and the model is neither in the local cache nor a"
    for function in [load_model, load_tokenizer, model_shape, model_identity]:
        with pytest.raises(ValueError, match=message):
            function(NAME)


def test_a_folders_identity_is_its_path_and_its_content(model_folder, tmp_path):
    identity = model_identity(str(model_folder))
    assert identity.keys() == {"path", "config", "weights"} and json.loads(json.dumps(identity)) == identity
    assert model_identity(f"{model_folder}/../model/") == identity
    link = tmp_path / "link"
    link.symlink_to(model_folder)
    assert model_identity(str(link)) == identity

    def differs() -> set[str]:
        return {key for key, value in model_identity(str(model_folder)).items() if value != identity[key]}

    weights = load_file(model_folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    save_file(weights | {name: 2 * weights[name]}, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert differs() == {"weights"}  # of the same sizes, under the same name
    shutil.copy(model_folder / "model.safetensors", tmp_path / "model.safetensors")
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    assert differs() == {"weights"}
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1}))
    assert differs() == {"weights", "config"}
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    assert model_identity(str(copy)) == model_identity(str(model_folder)) | {"path": str(copy)}


def test_the_built_in_models_identity_is_no_path():
    identity = model_identity("tiny-python")
    folder = model_identity(str(BUILT_IN["tiny-python"]))
    assert identity == {"id": "tiny-python", "config": folder["config"], "weights": folder["weights"]}


# what a user gets wrong


@pytest.mark.parametrize(
    "kind, message",
    [
        ("adapter alone", "its adapter_config.json names no base_model_name_or_path"),
        ("adapter beside", r"a PEFT adapter \(LoRA\) lies beside the model; move it into a folder of its own"),
        ("gguf folder", "GGUF files cannot be read; name the model that it was converted from"),
        ("gguf file", "GGUF files cannot be read; name the model that it was converted from"),
    ],
)
def test_what_is_shared_like_a_model_and_is_none(kind, message, model_folder):
    name = str(model_folder)
    if "adapter" in kind:
        (model_folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        (model_folder / "adapter_model.safetensors").write_bytes(b"")
    if kind != "adapter beside":
        (model_folder / "config.json").unlink()
    if "gguf" in kind:
        (model_folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
        name += "/model.Q4_K_M.gguf" if kind == "gguf file" else ""
    for function in [load_model, model_shape]:
        with pytest.raises(ValueError, match=f"cannot load '{name}': {message}"):
            function(name)


def test_weights_of_other_sizes_than_the_config_says(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(
        ValueError, match=r"do not fit its config.json: gpt_neox.* is \[16, 32\] where the config says \[16, 48\]"
    ):
        load_model(str(model_folder), last_layer=2)


def test_a_gguf_repo_on_the_hub(server):
    server.repos[NAME] = Repo(private=False, files={"model.Q4_K_M.gguf": b"GGUF"}, commits=["the model"])
    for function in [load_model, model_shape]:
        with pytest.raises(ValueError, match=f"cannot load '{NAME}': GGUF files cannot be read"):
            function(NAME)
        with pytest.raises(ValueError, match="cannot load 'alice/nothing': it is neither a folder here nor a model on"):
            function("alice/nothing")


REMOTE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        {line}
"""


def with_own_code(folder: Path, line: str) -> str:
    """The folder with a model that transformers has no class for, and whose constructor runs the line."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(REMOTE.format(line=line))
    return str(folder)


def test_code_of_a_models_own_may_compute_while_it_is_constructed(model_folder):
    name = with_own_code(model_folder, "self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]")
    assert model_shape(name, trust_remote_code=True).n_layers == 4
    for last_layer in [None, 1]:
        assert load_model(name, last_layer=last_layer, trust_remote_code=True).model.rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("line", ["raise RuntimeError('of many\\nlines')", "self.nothing.here", "import not_there"])
def test_whatever_code_of_a_models_own_raises_is_one_sentence(line, model_folder):
    name = with_own_code(model_folder, line)
    for function in [load_model, model_shape]:
        with pytest.raises(ValueError, match=f"cannot load '{name}': ") as error:
            function(name, trust_remote_code=True)
        assert "\n" not in str(error.value)
