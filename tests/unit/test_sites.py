"""The places inside a block: for each family the modules that a person would name, read and written exactly.

B texts, L positions, W width of a place.
"""

import tempfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.models import made_random, variants
from dictionary_learning.model import load_model
from dictionary_learning.sites import SITES, Tap, check_sites, name_of, place_at, stream_of, words_of

LLAMA = {
    "resid_pre": ("", "input"),
    "resid_mid": ("post_attention_layernorm", "input"),
    "resid_post": ("", "output"),
    "attn_out": ("self_attn", "output"),
    "mlp_out": ("mlp", "output"),
    "attn_z": ("self_attn.o_proj", "input"),
    "mlp_in": ("mlp", "input"),
}
# sublayers with norms of their own behind them
GEMMA = LLAMA | {
    "resid_mid": ("pre_feedforward_layernorm", "input"),
    "attn_out": ("post_attention_layernorm", "output"),
    "mlp_out": ("post_feedforward_layernorm", "output"),
}
PARALLEL = {site: place for site, place in LLAMA.items() if site != "resid_mid"}
FAMILIES = {
    "gpt2": LLAMA
    | {
        "resid_mid": ("ln_2", "input"),
        "attn_out": ("attn", "output"),
        "attn_z": ("attn.c_proj", "input"),
    },
    "gpt_neox": PARALLEL | {"attn_out": ("attention", "output"), "attn_z": ("attention.dense", "input")},
    "opt": LLAMA
    | {
        "resid_mid": ("final_layer_norm", "input"),
        "mlp_out": ("fc2", "output"),
        "mlp_in": ("fc1", "input"),
        "attn_z": ("self_attn.out_proj", "input"),
    },
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": GEMMA | {"resid_mid": ("mlp", "input")},
    "mixtral": LLAMA,
    "qwen3_moe": LLAMA,
    # the residual stream is added inside attention and MLP
    "bloom": LLAMA
    | {
        "attn_out": ("self_attention.dense", "output"),
        "mlp_out": ("mlp.dense_4h_to_h", "output"),
        "attn_z": ("self_attention.dense", "input"),
    },
    # one dropout for both sublayers
    "phi": PARALLEL | {"attn_z": ("self_attn.dense", "input")},
    # a part of the embedding is added behind the MLP, and all is multiplied by a number
    "gemma4_text": GEMMA,
    # linear attention in three layers of four
    "qwen3_next": LLAMA | {"attn_out": ("linear_attn", "output"), "attn_z": ("linear_attn.out_proj", "input")},
}
LAYER = 2


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tokenizer):
    """A random model of the family, in memory and loaded, with a padded batch and the tensors of plain hooks."""
    from transformers import AutoModelForCausalLM

    config = next(iter(variants(request.param)))[1]
    model = made_random(AutoModelForCausalLM.from_config(config))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        whole, cut = load_model(folder), load_model(folder, last_layer=LAYER)
        half = load_model(folder, dtype=torch.bfloat16)
    tokens_BL = torch.randint(5, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones(3, 12, dtype=torch.bool)
    mask_BL[1, 7:] = False
    yield SimpleNamespace(
        name=request.param, whole=whole, cut=cut, half=half, text=(tokens_BL, mask_BL), modules=FAMILIES[request.param]
    )


def block_of(lm, layer=LAYER) -> nn.Module:
    return lm.layers[layer]


def by_plain_hooks(lm, text, modules, write=None):
    """({site: x}, logits); write: (site, x) that goes on in place of what is there."""
    seen, handles = {}, []

    def into(site):
        def hook(_module, args, kwargs):
            key = next(iter(kwargs)) if not args else 0
            x = args[0] if args else kwargs[key]
            seen[site] = x.clone()
            if write is not None and write[0] == site:
                if args:
                    return (write[1].reshape(x.shape), *args[1:]), kwargs
                return args, kwargs | {key: write[1].reshape(x.shape)}

        return hook

    def out_of(site):
        def hook(_module, _args, output):
            x = stream_of(output)
            seen[site] = x.clone()
            if write is not None and write[0] == site:
                new = write[1].reshape(x.shape)
                return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        return hook

    for site, (path, side) in modules.items():
        module = block_of(lm).get_submodule(path)
        if side == "input":
            handles.append(module.register_forward_pre_hook(into(site), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(out_of(site)))
    with torch.no_grad():
        logits = lm.model(text[0], attention_mask=text[1].long(), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return {site: x.reshape(*text[0].shape, -1) for site, x in seen.items()}, logits


def test_every_site_is_what_a_plain_hook_on_its_module_sees(family):
    expected, logits = by_plain_hooks(family.whole, family.text, family.modules)
    places = {site: Tap(LAYER, site) for site in family.modules}
    got_logits, x_by_place = family.whole.run(*family.text, places.values())
    assert torch.equal(got_logits, logits)
    for lm in (family.whole, family.cut):  # all in one pass, of the whole model and of one cut behind the block
        x_by_place = lm.activations(*family.text, places.values())
        for site, place in places.items():
            assert torch.equal(x_by_place[place], expected[site]), site
            assert lm.width(place) == expected[site].shape[-1]


def test_what_a_family_lacks_is_one_sentence(family):
    for site in set(SITES) - family.modules.keys():
        with pytest.raises(
            ValueError, match=f"^cannot read {site} of layer {LAYER} of .*: it has no resid_mid: its att"
        ):
            family.whole.point(Tap(LAYER, site))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sites_own_activations_give_the_models_logits(family, dtype):
    lm = family.whole if dtype == "float32" else family.half
    places = [Tap(LAYER, site) for site in family.modules]
    logits, x_by_place = lm.run(*family.text, [*places, LAYER - 1])
    for place in places:
        for below in (x_by_place[LAYER - 1], None):
            assert torch.equal(lm.run_from(place, x_by_place[place], *family.text, below), logits), place


def test_what_is_written_at_a_site_is_what_the_rest_of_the_model_reads(family):
    places = {site: Tap(LAYER, site) for site in family.modules}
    _, x_by_place = family.whole.run(*family.text, [*places.values(), LAYER - 1])
    for seed, (site, place) in enumerate(places.items()):
        x = torch.randn(x_by_place[place].shape, generator=torch.Generator().manual_seed(seed))
        before = x.clone()
        logits = family.whole.run_from(place, x, *family.text, x_by_place[LAYER - 1])
        assert torch.equal(x, before), "what was handed over is left alone"
        if site != "resid_mid":  # of which a hook on the norm changes only what the norm reads
            assert torch.equal(logits, by_plain_hooks(family.whole, family.text, family.modules, (site, x))[1]), site
            continue
        attention = x - x_by_place[Tap(LAYER, "resid_pre")]
        expected = by_plain_hooks(family.whole, family.text, family.modules, ("attn_out", attention))[1]
        assert torch.allclose(logits, expected, atol=1e-3, rtol=1e-3)


def test_the_run_ends_at_the_deepest_site(family):
    ran = []
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in family.whole.layers]
    family.whole.activations(*family.text, [Tap(LAYER, "resid_pre")])
    for handle in handles:
        handle.remove()
    assert len(ran) == LAYER


def test_any_module_is_a_site_by_its_path(tiny_model_folder):
    lm = load_model(str(tiny_model_folder), last_layer=2)
    tokens_BL = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones_like(tokens_BL)
    paths = ["gpt_neox.layers.{layer}.mlp.dense_4h_to_h.input", "gpt_neox.layers.{layer}.mlp", "resid_post"]
    x_by_place = lm.activations(tokens_BL, mask_BL, [place_at(2, path) for path in paths])
    seen = []
    handle = lm.layers[2].mlp.dense_4h_to_h.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    whole = load_model(str(tiny_model_folder))
    assert torch.equal(
        x_by_place[Tap(2, paths[1])], whole.activations(tokens_BL, mask_BL, [Tap(2, "mlp_out")])[Tap(2, "mlp_out")]
    )
    lm.activations(tokens_BL, mask_BL, [2])
    handle.remove()
    assert torch.equal(x_by_place[Tap(2, paths[0])], seen[0]) and lm.width(Tap(2, paths[0])) == 32


@pytest.mark.parametrize(
    "path, why",
    [
        ("gpt_neox.layers.{layer}.nothing", "it has no module gpt_neox.layers.2.nothing"),
        ("gpt_neox.layers.{layer}.mlp.output.input", "it has no module gpt_neox.layers.2.mlp.output.input"),
        ("gpt_neox.layers.{layer}.attention.rotary", "it has no module"),
        ("gpt_neox.layers.{layer}.mlp.act.bias", "it has no module"),
    ],
)
def test_a_path_that_names_nothing_is_one_sentence(tiny_model_folder, path, why):
    with pytest.raises(ValueError, match=f"^cannot read .* of layer 2 of .*: {why}"):
        load_model(str(tiny_model_folder)).point(Tap(2, path))


def test_a_module_that_is_no_tensor_of_activations_is_one_sentence(tiny_model_folder):
    lm = load_model(str(tiny_model_folder))

    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x}

    lm.layers[1].mlp.odd = Odd()
    own = lm.layers[1].mlp.forward
    lm.layers[1].mlp.forward = lambda x: own(lm.layers[1].mlp.odd(x)["x"])
    with pytest.raises(ValueError, match=r"the output of its gpt_neox.layers.1.mlp.odd is no tensor .* but a dict$"):
        lm.point(Tap(1, "gpt_neox.layers.{layer}.mlp.odd"))
    lm.layers[1].mlp.forward = lambda x: own(own(x))
    with pytest.raises(ValueError, match="text runs its gpt_neox.layers.1.mlp.dense_h_to_4h 2 times"):
        lm.point(Tap(1, "gpt_neox.layers.{layer}.mlp.dense_h_to_4h"))


def test_a_layer_without_attention_says_what_it_has(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = made_random(AutoModelForCausalLM.from_config(next(iter(variants("jamba")))[1]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"no attention, but mamba; .* such as model.layers.\{layer\}.mamba$"):
        lm.point(Tap(0, "attn_out"))
    tokens_BL = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones_like(tokens_BL)
    places = [Tap(0, site) for site in ("resid_pre", "mlp_in", "mlp_out", "model.layers.{layer}.mamba")]
    logits, x_by_place = lm.run(tokens_BL, mask_BL, [*places, 0])
    pre, mlp_in, mlp_out, mamba = (x_by_place[place] for place in places)
    assert torch.allclose(pre + mamba + mlp_out, x_by_place[0], atol=1e-5)
    assert torch.equal(lm.layers[0].feed_forward(mlp_in), mlp_out)
    for place in places:
        assert torch.equal(lm.run_from(place, x_by_place[place], tokens_BL, mask_BL), logits)


@pytest.fixture
def loaded(tokenizer, tmp_path):
    """A random model of a family, loaded; `change` what is saved of it."""
    from transformers import AutoModelForCausalLM

    def load(model_type, dtype=torch.float32, change=lambda model: None):
        model = made_random(AutoModelForCausalLM.from_config(next(iter(variants(model_type)))[1]))
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return load_model(str(tmp_path), dtype=dtype)

    return load


def test_a_module_that_holds_attention_and_an_mlp_is_looked_into(loaded):
    lm = loaded("zamba2")
    shared = lm.layers[1].shared_transformer
    assert lm.point(Tap(1, "attn_z")).module is shared.self_attn.o_proj
    for site in ("attn_out", "mlp_in", "mlp_out"):  # of its MLP and what is behind it, none is that of the block
        with pytest.raises(ValueError, match="it returns no sum of what it is given, its attention and its MLP"):
            lm.point(Tap(1, site))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixer_beside_attention_is_added_before_the_mlp(loaded, dtype):
    lm = loaded("falcon_h1", dtype)
    tokens_BL = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones_like(tokens_BL)
    seen = []
    norm = lm.layers[LAYER].pre_ff_layernorm
    handle = norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    logits, x_by_place = lm.run(tokens_BL, mask_BL, [place := Tap(LAYER, "resid_mid")])
    handle.remove()
    assert torch.equal(x_by_place[place], seen[-1])
    assert torch.equal(lm.run_from(place, seen[-1], tokens_BL, mask_BL), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_whose_rounding_depends_on_the_batch_are_an_mlp(loaded, dtype):
    lm = loaded("gpt_oss", dtype)
    for layer in range(lm.n_layers):
        own = lm.layers[layer].mlp.forward

        def rounded(x, *more, own=own):
            up = torch.finfo(x.dtype).eps if x[0, 0, 0] > x[0, 0, -1] else 0
            made, *others = own(x, *more)
            made = made.clone()
            made[..., 0] *= 1 + up  # the last bit of one entry of many
            return made, *others

        lm.layers[layer].mlp.forward = rounded
        assert lm.point(Tap(layer, "mlp_in")).module is lm.layers[layer].mlp
        assert lm.point(Tap(layer, "mlp_out")).module is lm.layers[layer].mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_huge_entries_of_the_residual_stream_hide_no_part(loaded, dtype):
    """Gemma 4 adds a part of the embedding behind the MLP, which alone would do if rounding could hide the MLP."""

    def enlarge(model):
        model.get_input_embeddings().weight[:, 0] = 1e4

    block = (lm := loaded("gemma4_text", dtype, enlarge)).layers[LAYER]
    assert lm.point(Tap(LAYER, "mlp_out")).module is block.post_feedforward_layernorm
    assert lm.point(Tap(LAYER, "resid_mid")).module is block.pre_feedforward_layernorm


def test_activations_that_overflow_are_one_sentence(loaded):
    def enlarge(model):
        model.get_input_embeddings().weight[:, 0] = 6e4
        for block in model.model.layers:
            block.post_attention_layernorm.weight[0] = 6e4

    lm = loaded("olmo2", torch.float16, enlarge)
    for site in ("attn_out", "resid_mid", "mlp_in"):
        with pytest.raises(ValueError, match="what it computes in float16 is not finite, so that its parts cannot be"):
            lm.point(Tap(LAYER, site))


def test_names_and_words():
    assert place_at(3) == 3 and place_at(3, "resid_post") == 3 and place_at(3, "mlp_out") == Tap(3, "mlp_out")
    assert name_of(3) == "resid_post_layer_3" and words_of(3) == "layer 3"
    assert name_of(Tap(3, "mlp_in"), Tap(3, "mlp_out")) == "mlp_in_to_mlp_out_layer_3"
    assert name_of(Tap(3, "h.{layer}.mlp.c_fc")) == "h.3.mlp.c_fc_layer_3"
    assert words_of(Tap(3, "mlp_out")) == "mlp_out of layer 3"
    check_sites([*SITES, "h.{layer}.mlp.c_fc"])
    with pytest.raises(ValueError, match="there is no site 'mlp_outs': give one of resid_pre, "):
        check_sites(["mlp_outs"])
    with pytest.raises(ValueError, match=r"h.3.mlp is one module of one layer: write \{layer\} where its number"):
        check_sites(["h.3.mlp"])
