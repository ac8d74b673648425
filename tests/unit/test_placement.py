"""Models that do not fit: adapters, quantised weights, models over several devices; the packages that these need."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import demo
from dictionary_learning import pretrained
from dictionary_learning.model import load_model, load_tokenizer, model_identity, model_shape

# of peft's, which asks transformers in an old way
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory) -> Path:
    """A LoRA of the tiny model, trained nowhere, whose every weight is random."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    config = peft.LoraConfig(r=2, target_modules=["query_key_value", "dense_h_to_4h"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def tokens():
    tokens_BL = 1 + torch.arange(24).reshape(2, 12)
    return tokens_BL, torch.ones_like(tokens_BL)


@pytest.mark.parametrize("last_layer", [None, 1])
def test_an_adapter_is_its_base_model_with_the_weights_merged(last_layer, adapter, tiny_model_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lm = load_model(str(adapter), last_layer=last_layer)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), adapter).eval()
    with torch.no_grad():
        hidden = theirs(*tokens(), output_hidden_states=True).hidden_states
    x_by_layer = lm.activations(*tokens(), [0, 1])
    for layer in (0, 1):
        torch.testing.assert_close(x_by_layer[layer], hidden[layer + 1], rtol=1e-4, atol=1e-5)
    base = load_model(str(tiny_model_folder), last_layer=last_layer)
    assert not torch.allclose(base.activations(*tokens(), [1])[1], x_by_layer[1], atol=1e-2)
    assert model_shape(str(adapter)) == model_shape(str(tiny_model_folder))
    assert len(load_tokenizer(str(adapter))) == len(load_tokenizer(str(tiny_model_folder)))


def test_an_adapter_has_an_identity_of_its_own(adapter, tiny_model_folder, tmp_path):
    identity = model_identity(str(adapter))
    assert not pretrained.same_model(identity, model_identity(str(tiny_model_folder)))
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert pretrained.same_model(identity, model_identity(str(copy)))
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert not pretrained.same_model(identity, model_identity(str(copy)))


@pytest.mark.parametrize("last_layer", [None, 1])
@pytest.mark.parametrize("renamed, n", [("base_model.model.gpt_neox.", 16), ("layers.0.attention.", 2)])
def test_weights_of_an_adapter_that_belong_to_nothing_are_counted(renamed, n, last_layer, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 16
    moved = {name.replace(renamed, renamed[:-1] + "_of_another."): tensor for name, tensor in weights.items()}
    save_file(moved, copy / "adapter_model.safetensors")
    if n == 16:
        with pytest.raises(
            ValueError, match=f"cannot load '{copy}': the adapter has no weights of .*, but such as base_"
        ):
            load_model(str(copy), last_layer=last_layer)
    else:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            load_model(str(copy), last_layer=last_layer)
        sentence = f"2 of the 16 weights of the adapter {copy} belong to no module of "
        assert sum(str(warning.message).startswith(sentence) for warning in told) == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_model(str(adapter), last_layer=last_layer)
    assert not any("belong to no module" in str(warning.message) for warning in told)


def test_an_adapter_of_upper_layers_changes_none_below(tiny_model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    config = peft.LoraConfig(r=2, target_modules=["dense"], layers_to_transform=[3], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    whole, below = load_model(str(tmp_path)), load_model(str(tmp_path), last_layer=2)
    for layer in (1, 2):
        torch.testing.assert_close(below.activations(*tokens(), [layer]), whole.activations(*tokens(), [layer]))
    base = load_model(str(tiny_model_folder)).activations(*tokens(), [3])[3]
    assert not torch.allclose(whole.activations(*tokens(), [3])[3], base, atol=1e-2)


def lora_folder(tmp_path, base) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def without(monkeypatch, package: str) -> None:
    """As where this optional package is missing and the others are there."""

    def find(name, *args):
        return None if name == package else object()

    monkeypatch.setattr("dictionary_learning.pretrained.find_spec", find)


def test_without_peft_one_sentence_names_it(tiny_model_folder, tmp_path, monkeypatch):
    without(monkeypatch, "peft")
    folder = lora_folder(tmp_path, str(tiny_model_folder))
    with pytest.raises(ValueError, match=r"is a PEFT adapter \(LoRA\), which needs peft: pip install '.*\[adapters\]'"):
        load_model(str(folder))


def test_an_adapter_that_names_no_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its adapter_config.json names no base_model_name_or_path"):
        model_shape(str(lora_folder(tmp_path, None)))


@pytest.mark.parametrize(
    "flags, package, extra",
    [
        (["--quantization", "8bit"], "bitsandbytes", "quantization"),
        (["--quantization", "4bit"], "accelerate", "quantization"),
        (["--device_map", "auto"], "accelerate", "device_map"),
    ],
)
def test_without_its_package_a_flag_names_it(flags, package, extra, monkeypatch, tmp_path, capsys):
    without(monkeypatch, package)
    assert demo.main([*flags, "--save_dir", str(tmp_path), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {' '.join(flags)} needs {package}: pip install 'dictionary-learning-demo[{extra}]'\n"


def test_two_places_for_the_model_are_refused(tmp_path, capsys):
    flags = ["--llm_device", "cpu", "--device_map", "auto", "--save_dir", str(tmp_path), "--dry_run"]
    assert demo.main(flags) == 2
    assert "give one of the two" in capsys.readouterr().err
    assert demo.main(["--llm_device", "cuda:9", "--save_dir", str(tmp_path), "--dry_run"]) == 2
    assert "there is no device 'cuda:9' here" in capsys.readouterr().err


def test_a_model_placed_by_accelerate_computes_the_same(tiny_model_folder):
    pytest.importorskip("accelerate")
    placed = load_model(str(tiny_model_folder), last_layer=2, device_map="auto")
    x_BLD = load_model(str(tiny_model_folder), last_layer=2).activations(*tokens(), [2])[2]
    torch.testing.assert_close(placed.activations(*tokens(), [2])[2].to(x_BLD.device), x_BLD)


@pytest.mark.parametrize("quantization, least", [("8bit", 0.99), ("4bit", 0.9)])
def test_a_quantised_model_computes_about_the_same(quantization, least):
    pytest.importorskip("bitsandbytes")
    lm = load_model("tiny-python", quantization=quantization, last_layer=2)
    assert any(f"Linear{quantization}" in type(module).__name__.replace("Lt", "") for module in lm.model.modules())
    x_BLD = load_model("tiny-python", last_layer=2).activations(*tokens(), [2])[2]
    y_BLD = lm.activations(*tokens(), [2])[2]
    similarity = torch.nn.functional.cosine_similarity(x_BLD.flatten(), y_BLD.flatten().to(x_BLD.dtype), dim=0)
    assert least < similarity < 1 - 1e-6


def test_the_text_side_of_an_image_text_model_is_read(tokenizer, tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokens_BL = 10 + torch.arange(24).reshape(2, 12)  # no image among them
    with torch.no_grad():
        hidden = model(input_ids=tokens_BL, output_hidden_states=True).hidden_states
    assert model_shape(str(tmp_path))[:2] == (3, 16)
    for last_layer in (None, 1):
        lm = load_model(str(tmp_path), last_layer=last_layer)
        x_BLD = lm.activations(tokens_BL, torch.ones_like(tokens_BL), [1])[1]
        torch.testing.assert_close(x_BLD, hidden[2])
