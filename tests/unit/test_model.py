"""B texts, L positions, V vocabulary, D activation_dim: every law holds for every family of models."""

import copy
import json
import logging
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.models import tried, variants
from dictionary_learning.model import (
    LanguageModel,
    load_model,
    load_tokenizer,
    model_shape,
    resolve_device,
)
from dictionary_learning.pretrained import one_sentence

N_LAYERS, D, V = 4, 16, 257
SIZES = dict(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
)
GROUPED = SIZES | dict(num_key_value_heads=1, head_dim=8, sliding_window=4)
FAMILIES = {
    "gpt_neox": SIZES,
    "gpt2": SIZES,
    "llama": GROUPED,
    "qwen2": SIZES | dict(num_key_value_heads=1),
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "opt": SIZES | dict(ffn_dim=32, word_embed_proj_dim=D, pad_token_id=1),
    "bloom": {key: SIZES[key] for key in SIZES if key != "max_position_embeddings"},
    "mistral": GROUPED,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tokenizer, tmp_path_factory):
    """One family: its whole model, a folder with it, and the tokens, mask, logits and activations of a padded batch."""
    from transformers import AutoConfig, AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **FAMILIES[request.param])).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    tokens_BL = torch.randint(2, V, (3, 12), generator=generator)
    mask_BL = torch.ones(3, 12, dtype=torch.bool)
    mask_BL[1, 7:] = False
    whole = load_model(str(folder))
    logits_BLV, x_by_layer = whole.run(tokens_BL, mask_BL, range(N_LAYERS))
    return SimpleNamespace(
        model=model,
        folder=str(folder),
        tokens=tokens_BL,
        mask=mask_BL,
        whole=whole,
        logits=logits_BLV,
        x_by_layer=x_by_layer,
    )


def test_activations_are_the_hidden_states_of_the_whole_model(family):
    with torch.no_grad():
        output = family.model(family.tokens, attention_mask=family.mask.long(), output_hidden_states=True)
    assert torch.equal(family.logits, output.logits)
    for layer in range(N_LAYERS - 1):  # the last of the hidden states is normalised
        assert torch.equal(family.x_by_layer[layer], output.hidden_states[layer + 1])


@pytest.mark.parametrize("last_layer", range(N_LAYERS))
def test_a_truncated_model_has_the_whole_models_activations(family, last_layer):
    lm = load_model(family.folder, last_layer=last_layer)
    for layers in [{last_layer}, set(range(last_layer + 1)), {0}]:
        x_by_layer = lm.activations(family.tokens, family.mask, layers)
        assert x_by_layer.keys() == layers
        for layer, x_BLD in x_by_layer.items():
            assert x_BLD.shape == (3, 12, D) and not x_BLD.requires_grad and not x_BLD.is_inference()
            assert torch.equal(x_BLD, family.x_by_layer[layer])


@pytest.fixture
def transformers_log():
    """What transformers logs as warnings, which its own handler prints and pytest does not see."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_what_is_cut_never_exists(family, transformers_log):
    lm = load_model(family.folder, last_layer=1)
    assert transformers_log == []
    assert len(lm.layers) == 2 and lm.n_layers == N_LAYERS
    assert not any(parameter.is_meta for parameter in lm.model.parameters())
    # what is left: the decoder without its upper blocks, and the unembedding only where it is the embedding
    expected = {id(parameter) for parameter in family.whole.model.get_decoder().parameters()}
    expected -= {id(parameter) for block in family.whole.layers[2:] for parameter in block.parameters()}
    names = {name for name, parameter in family.whole.model.named_parameters() if id(parameter) in expected}
    assert {name for name, _ in lm.model.named_parameters()} == names
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, family.whole.model.get_parameter(name))


@pytest.mark.parametrize("last_layer", [None, 2])
def test_the_shape_is_known_without_weights(family, last_layer, tmp_path):
    shutil.copy(Path(family.folder) / "config.json", tmp_path)
    shape = model_shape(str(tmp_path), last_layer=last_layer)
    loaded = load_model(family.folder, last_layer=last_layer).model
    assert shape[:3] == (N_LAYERS, D, V)
    assert shape.n_parameters == sum(parameter.numel() for parameter in loaded.parameters())


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_running_on_from_its_own_activations_gives_the_models_logits(family, layer):
    args = family.tokens, family.mask
    assert torch.equal(family.whole.run_from(layer, family.x_by_layer[layer], *args), family.logits)
    assert not torch.equal(family.whole.run_from(layer, 0 * family.x_by_layer[layer], *args), family.logits)
    assert torch.equal(family.whole.run(*args)[0], family.logits)  # the blocks are themselves again


def test_padding_changes_no_activations(family):
    alone = family.whole.activations(family.tokens[1:2, :7], family.mask[1:2, :7], range(N_LAYERS))
    for layer, x_BLD in alone.items():
        torch.testing.assert_close(x_BLD[0], family.x_by_layer[layer][1, :7], atol=1e-5, rtol=1e-5)


VERDICTS = {  # of the families that other ways of reading get wrong: a word of the refusal, or None
    "bert": "no causal language model",
    "bert is_decoder": None,
    "cpmant": "no single residual stream",
    "falcon_mamba": None,  # fp32 blocks in a bf16 model
    "gemma3_text bidirectional": "no causal language model",
    "gemma4_text keys shared": None,  # upper blocks read keys and values of lower ones
    "glm_moe_dsa indices shared": None,  # upper blocks read the indices of lower ones
    "inkling2_text": None,  # upper blocks read the inputs of lower ones
    "longcat_flash": None,  # half as many blocks as its config says
    "mbart is_decoder": None,  # as many blocks as its config says of the decoder
    "mllama": None,  # text does not run every block
    "modernbert-decoder": None,  # get_decoder() is the output layer
    "mpt": None,
    "musicgen": "its own code fails",
    "prophetnet is_decoder": "no single residual stream",
    "qwen4_exp_text": "no single residual stream",
    "reformer": "no residual stream but a ReformerOutput",
    "roberta is_decoder": None,
    "rwkv halved": None,  # the stream is halved between two blocks
    "whisper": None,
    "xlm": "does not read",
    "xlnet": "no single residual stream",
    "zaya": None,  # what is beside the stream in a block's output is read by the next
}


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own
@pytest.mark.parametrize("label", VERDICTS)
def test_a_family_is_exact_or_refused_in_one_sentence(label):
    configs = dict(variants(label.removesuffix(" is_decoder")))
    _, verdict, why = tried(label, lambda: configs[label])
    expected = VERDICTS[label]
    assert verdict == ("refused" if expected else "exact"), why
    assert (expected or "") in why and "\n" not in why


class Block(nn.Module):
    """A block that returns its residual stream in a container of the given type."""

    def __init__(self, container: type):
        super().__init__()
        self.linear, self.container = nn.Linear(D, D), container

    def forward(self, x_BLD):
        x_BLD = x_BLD + self.linear(x_BLD)
        return x_BLD if self.container is torch.Tensor else self.container((x_BLD, None))


class Model(nn.Module):
    """The least that LanguageModel asks of a model of transformers."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, n_blocks: int = 3, container: type = torch.Tensor, wiring=None):
        super().__init__()
        self.wiring = wiring or self.in_order
        text_config = SimpleNamespace(num_hidden_layers=3, hidden_size=D)
        self.config = SimpleNamespace(get_text_config=lambda decoder: text_config)
        self.embed, self.blocks = nn.Embedding(V, D), nn.ModuleList(Block(container) for _ in range(n_blocks))

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    @property
    def base_model(self):
        return self

    def in_order(self, blocks, x_BLD):
        for block in blocks:
            output = block(x_BLD)
            x_BLD = output if isinstance(output, torch.Tensor) else output[0]
        return x_BLD

    def forward(self, input_ids, **_):
        x_BLD = self.wiring(self.blocks, self.embed(input_ids))
        return SimpleNamespace(logits=x_BLD @ self.embed.weight.T.to(x_BLD.dtype))


@pytest.mark.parametrize("container", [torch.Tensor, tuple, list])
def test_blocks_may_return_any_container(container, tokenizer):
    lm = LanguageModel(Model(container=container), tokenizer, "a model")
    tokens_BL = torch.arange(10).view(2, 5)
    logits_BLV, x_by_layer = lm.run(tokens_BL, tokens_BL >= 0, [1])
    assert torch.equal(lm.run_from(1, x_by_layer[1], tokens_BL, tokens_BL >= 0), logits_BLV)
    x_BLD = x_by_layer[1].double().flip(0)
    assert torch.equal(lm.run_from(1, x_BLD, tokens_BL, tokens_BL >= 0), logits_BLV.flip(0))


def test_blocks_are_themselves_again_after_an_error_and_where_they_were_wrapped(tokenizer):
    lm = LanguageModel(Model(), tokenizer, "a model")
    tokens_BL = torch.arange(10).view(2, 5)
    wrapped = lm.layers[0].forward = lm.layers[0].forward
    logits_BLV, x_by_layer = lm.run(tokens_BL, tokens_BL >= 0, [1])
    lm.run_from(1, x_by_layer[1], tokens_BL, tokens_BL >= 0)
    lm.layers[2].forward = None
    with pytest.raises(TypeError):
        lm.run_from(1, x_by_layer[1], tokens_BL, tokens_BL >= 0)
    del lm.layers[2].forward
    assert lm.layers[0].forward is wrapped
    assert torch.equal(lm.run(tokens_BL, tokens_BL >= 0)[0], logits_BLV)


def test_a_pass_ends_at_the_deepest_layer_and_leaves_no_hooks(tokenizer):
    lm = LanguageModel(Model(), tokenizer, "a model")
    tokens_BL = torch.arange(10).view(2, 5)
    lm.layers[2].forward = None  # would be called by a pass that goes on
    assert lm.activations(tokens_BL, tokens_BL >= 0, [1, 0, 1]).keys() == {0, 1}
    assert not any(block._forward_hooks for block in lm.layers)


@pytest.mark.parametrize("can_be_copied", [True, False])
def test_texts_are_shared_out_to_threads_of_the_same_weights(can_be_copied, tokenizer, monkeypatch):
    lm = LanguageModel(Model(), tokenizer, "a model")
    tokens_BL = torch.randint(20, (5, 6), generator=torch.Generator().manual_seed(0))
    whole = lm.activations(tokens_BL, torch.ones_like(tokens_BL), [1, 2])
    if not can_be_copied:
        lm.model.lock = threading.Lock()
    used: set[tuple[str, int]] = set()
    seen = lm.layers[0].register_forward_hook(
        lambda *_: used.add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))
    )
    monkeypatch.setattr("dictionary_learning.model.PART_TOKENS", 6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = lm.activations(tokens_BL, torch.ones_like(tokens_BL), [1, 2])
    finally:
        torch.set_num_threads(threads)
    seen.remove()
    assert used == ({("workers", 1)} if can_be_copied else {("MainThread", 3)})
    for layer, x_BLD in whole.items():
        torch.testing.assert_close(shared[layer], x_BLD)
    for other in lm.copies(3)[1:]:
        assert all(map(torch.Tensor.is_set_to, other.model.parameters(), lm.model.parameters()))
    assert len(lm.copies(3)) == (3 if can_be_copied else 1)


def test_activations_can_be_trained_on(tokenizer):
    lm = LanguageModel(Model(), tokenizer, "a model")
    x_BLD = lm.activations(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool), [0])[0]
    weight = torch.ones(D, requires_grad=True)
    (x_BLD * weight).sum().backward()
    assert weight.grad is not None


def test_dtype_and_bos_and_pad(tiny_model_folder, tokenizer):
    lm = load_model(str(tiny_model_folder), dtype=torch.bfloat16, last_layer=0)
    tokens_BL = torch.ones(1, 3, dtype=torch.long)
    assert lm.dtype == torch.bfloat16 == lm.activations(tokens_BL, tokens_BL > 0, [0])[0].dtype
    assert (lm.bos_id, lm.pad_id) == (0, 0)
    names = dict(bos_token_id=None, eos_token_id=5, pad_token_id=7)
    lm = LanguageModel(Model(), SimpleNamespace(**names), "a model")
    assert (lm.bos_id, lm.pad_id) == (5, 7)
    with pytest.raises(ValueError, match="no eos token"):
        LanguageModel(Model(), SimpleNamespace(**names | {"eos_token_id": None, "pad_token_id": None}), "a model")


@pytest.mark.parametrize("last_layer", [None, 0])
def test_the_generation_config_says_what_separates_documents(last_layer, tiny_model_folder, tokenizer, tmp_path):
    shutil.copytree(tiny_model_folder, tmp_path, dirs_exist_ok=True)
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens(
        {"eos_token": chat.convert_ids_to_tokens(5), "extra_special_tokens": [chat.convert_ids_to_tokens(7)]}
    )
    chat.bos_token, chat.chat_template = None, "{{ messages }}" + chat.eos_token + "<|endoftext|>"
    chat.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    lm = load_model(str(tmp_path), last_layer=last_layer)
    assert (lm.tokenizer.eos_token_id, lm.bos_id, lm.separator_id, lm.pad_id) == (5, 7, 7, 7)


def test_the_built_in_model():
    shape = model_shape("tiny-python")
    lm = load_model("tiny-python", last_layer=0)
    assert (lm.name, lm.n_layers, lm.activation_dim) == ("tiny-python", shape.n_layers, shape.activation_dim)
    assert len(lm.layers) == 1 and len(lm.tokenizer) <= shape.vocab_size


# what a user gets wrong


def test_a_layer_that_is_not_there(tiny_model_folder):
    name = str(tiny_model_folder)
    for layer in [4, -1]:
        with pytest.raises(ValueError, match=rf"has 4 layers \(0 to 3\), not {layer}"):
            load_model(name, last_layer=layer)
        with pytest.raises(ValueError, match=rf"has 4 layers \(0 to 3\), not {layer}"):
            model_shape(name, last_layer=layer)
        with pytest.raises(ValueError, match=rf"has 4 layers \(0 to 3\), not {layer}"):
            load_model(name).activations(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2), [0, layer])


def test_the_list_of_blocks_says_how_many_there_are(tokenizer):
    assert LanguageModel(Model(n_blocks=2), tokenizer, "a model").n_layers == 2  # its config says 3
    with pytest.raises(ValueError, match="cannot load 'a model': its decoder has no list of layers"):
        LanguageModel(Model(n_blocks=0), tokenizer, "a model")


def replaced(block: int, forward):
    """A model whose block is called as forward(block, x_BLD)."""
    model = Model(container=tuple)
    own = model.blocks[block].forward
    model.blocks[block].forward = lambda x_BLD: forward(own, x_BLD)
    return model


@pytest.mark.parametrize(
    "model, message",
    [
        (
            lambda: replaced(0, lambda own, x: own(x)[0].expand(4, *x.shape)),
            r"stream: \[4, 2, 3, 16\] for 2 texts of 3",
        ),
        (lambda: replaced(1, lambda own, x: own(x)[0].transpose(0, 1)), r"layer 1 .*stream: \[3, 2, 16\]"),
        (lambda: replaced(1, lambda own, x: {"x": x}), "layer 1 returns no residual stream but a dict"),
        (
            lambda: replaced(2, lambda own, x: (x.flip(1),)),
            "no causal language model: a token changes what layer 2 computes",
        ),
        (lambda: replaced(2, lambda own, x: 1 / 0), r"its own code fails \(ZeroDivisionError: division by zero\)"),
        (
            lambda: Model(wiring=lambda blocks, x: blocks[0](blocks[1](x))),
            "once and in order, layer 0 runs after layer 1",
        ),
        (
            lambda: Model(wiring=lambda blocks, x: blocks[0](blocks[0](x))),
            "once and in order, layer 0 runs after layer 0",
        ),
        (
            lambda: Model(wiring=lambda blocks, x: blocks[1](x + blocks[0](x))),
            "layer 1 does not read what layer 0 returns",
        ),
        (lambda: Model(wiring=lambda blocks, x: x), "text runs none of its layers"),
    ],
)
def test_blocks_that_do_not_hand_on_one_stream_are_one_sentence(model, message, tokenizer):
    with pytest.raises(ValueError, match=f"cannot load 'a model': .*{message}"):
        LanguageModel(model(), tokenizer, "a model")


def test_a_layer_that_text_does_not_run_keeps_its_number(tokenizer):
    lm = LanguageModel(Model(wiring=lambda blocks, x: blocks[2](blocks[0](x))), tokenizer, "a model")
    tokens_BL = torch.arange(10).view(2, 5)
    logits_BLV, x_by_layer = lm.run(tokens_BL, tokens_BL >= 0, [0, 2])
    for layer in [0, 2]:
        assert torch.equal(lm.run_from(layer, x_by_layer[layer], tokens_BL, tokens_BL >= 0), logits_BLV)
    message = r"text does not run layer 1 of a model, only layers \[0, 2\]"
    for function in [lm.run, lm.activations]:
        with pytest.raises(ValueError, match=message):
            function(tokens_BL, tokens_BL >= 0, [1])
    with pytest.raises(ValueError, match=message):
        lm.run_from(1, x_by_layer[0], tokens_BL, tokens_BL >= 0)


@pytest.mark.parametrize("upper_block_reads", ["the lower one's input", "more than the stream", "the stream alone"])
def test_lower_blocks_are_left_out_only_where_that_changes_nothing(upper_block_reads, tokenizer):
    def wiring(blocks, x_BLD):
        first_BLD = blocks[0](x_BLD)
        if upper_block_reads == "the lower one's input":
            kept.append(x_BLD)
        if upper_block_reads == "more than the stream":
            kept.append(calls[-1])
        return blocks[2](blocks[1](first_BLD)) + sum(kept)

    kept, calls = [], []
    model = Model(wiring=wiring)
    model.register_forward_pre_hook(lambda *_: kept.clear())
    linear = model.blocks[0].linear
    linear.register_forward_hook(lambda _linear, _args, output: calls.append(output))
    lm = LanguageModel(model, tokenizer, "a model")
    tokens_BL = torch.arange(10).view(2, 5)
    x_BLD = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    handle = lm.layers[1].register_forward_hook(lambda *_: x_BLD)
    expected_BLV, _ = lm.run(tokens_BL, tokens_BL >= 0)
    handle.remove()
    lm.run_from(1, x_BLD, tokens_BL, tokens_BL >= 0)
    n_calls = len(calls)
    assert torch.equal(lm.run_from(1, x_BLD, tokens_BL, tokens_BL >= 0), expected_BLV)
    assert len(calls) - n_calls == (upper_block_reads == "more than the stream")


def test_what_is_overwritten_has_the_blocks_own_dtype(tokenizer):
    model = replaced(0, lambda own, x: (own(x)[0].double() + 1e-12,))
    model.blocks[1:].double()
    lm = LanguageModel(model, tokenizer, "a model")
    tokens_BL = torch.arange(10).view(2, 5)
    logits_BLV, x_by_layer = lm.run(tokens_BL, tokens_BL >= 0, [0])
    assert (lm.dtype, x_by_layer[0].dtype) == (torch.float32, torch.float64)
    assert torch.equal(lm.run_from(0, x_by_layer[0], tokens_BL, tokens_BL >= 0), logits_BLV)


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "neither a folder here nor a model on the Hub"),
        ({}, "Should have a `model_type` key"),
        ({"model_type": "never_heard_of"}, "does not recognize this architecture"),
        ({"model_type": "t5"}, "is of type t5, which is no causal language model"),
        ({"auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}}, "pass trust_remote_code"),
    ],
)
def test_a_folder_that_is_no_model(config, message, tmp_path):
    folder = tmp_path / "model"
    if config is not None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    for function in [model_shape, load_model]:
        with pytest.raises(ValueError, match=message) as error:
            function(str(folder))
        assert "\n" not in str(error.value)


def test_a_folder_without_weights_or_tokenizer(tiny_model_folder, tmp_path):
    shutil.copy(tiny_model_folder / "config.json", tmp_path)
    for function in [load_tokenizer, load_model]:
        with pytest.raises(ValueError, match="cannot load"):
            function(str(tmp_path))
    for file in tiny_model_folder.glob("*token*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match="no file named model.safetensors"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "model_type, sizes, limit",
    [
        ("roberta", SIZES | dict(is_decoder=True, pad_token_id=1), 30),  # positions begin after padding's, 0 to 1
        ("mpt", dict(d_model=D, n_heads=2, n_layers=2, vocab_size=V, max_seq_len=40), 40),
        (
            "whisper",
            dict(
                d_model=D,
                decoder_layers=2,
                vocab_size=V,
                decoder_attention_heads=2,
                max_target_positions=24,
                pad_token_id=1,
            ),
            24,
        ),
        ("rwkv", dict(hidden_size=D, num_hidden_layers=2, vocab_size=V, context_length=20), 20),
        ("bloom", FAMILIES["bloom"], None),
        ("gpt_neox", SIZES | dict(max_position_embeddings=-1), None),
    ],
)
def test_the_context_limit_is_what_the_model_has_positions_for(model_type, sizes, limit, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)).context_limit == limit


def test_a_cut_model_needs_no_weights_above_the_cut(tiny_model_folder, tmp_path, transformers_log):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if ".layers." in key or "embed_in" in key}
    assert any("final_layer_norm" in key for key in weights.keys() - kept.keys())
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens_BL = torch.arange(2, 12).view(2, 5)
    x_BLD = load_model(str(tmp_path), last_layer=3).activations(tokens_BL, tokens_BL > 0, [3])[3]
    assert torch.equal(x_BLD, load_model(str(tiny_model_folder)).activations(tokens_BL, tokens_BL > 0, [3])[3])
    with pytest.raises(ValueError, match="lack .* weights of the model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("last_layer, is_lacking", [(None, True), (2, True), (1, False)])
def test_weights_that_are_missing_are_an_error_where_they_are_needed(
    last_layer, is_lacking, tiny_model_folder, tmp_path
):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if ".layers.2." not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if is_lacking:
        with pytest.raises(ValueError, match="lack .* weights of the model, such as .*layers.2"):
            load_model(str(tmp_path), last_layer=last_layer)
    else:
        load_model(str(tmp_path), last_layer=last_layer)


@pytest.mark.parametrize(
    "cause, message",
    [
        ("GatedRepoError", "accept its licence at https://huggingface.co/a/b, then run `hf auth login`"),
        ("RepositoryNotFoundError", "neither a folder here nor a model on the Hub"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "the Hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_said_inone_sentence(cause, message):
    from huggingface_hub import errors

    error_class = getattr(errors, cause)
    with pytest.raises(ValueError, match=message), one_sentence("a/b"):
        raise OSError("a long story\nof many lines") from error_class.__new__(error_class)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_want_of_memory_is_not_blamed_on_the_model(error, tokenizer):
    def forward(own, x_BLD):
        raise error

    with pytest.raises(error):
        LanguageModel(replaced(1, forward), tokenizer, "a model")


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device() == resolve_device("cpu") == torch.device("cpu")
    for name in ["cuda", "cuda:0", "mps", "gpu"]:
        with pytest.raises(ValueError, match=f"there is no device '{name}' here, only cpu"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="there is no device 'cuda:2' here, only cuda:0, cuda:1, cpu"):
        resolve_device("cuda:2")
