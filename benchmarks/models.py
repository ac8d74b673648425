"""Every type of AutoModelForCausalLM, tiny and random: read and overwritten exactly, or refused in one sentence.

    python benchmarks/models.py [TYPE ...] [--jobs 2] [--sites]

Prints a line for each type and variant. Exact means: activations are those of a plain forward hook, a truncated load
has the whole model's, running on from a layer is running the model with that block's output replaced, a later token
changes nothing before it, the context limit can be run at. "wrong" is anything else but a ValueError, "no model" a
configuration that transformers makes no model of.

With --sites it looks at the places inside the blocks instead. Exact then means: attention's and MLP's outputs and what
the block is given add up to what it returns, running on with a place's own activations gives the model's logits, and
running on with others there is the model with a plain hook that puts them there; a line also says what no block has.
"""

import argparse
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

D, V, N_LAYERS, LIMIT = 32, 288, 4, 48
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "attention_hidden_size"], D
    ),
    **dict.fromkeys(["word_embed_proj_dim", "dim_model", "embedding_dim", "lru_width", "projection_dim"], D),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "n_words"], V),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_blocks"], N_LAYERS
    ),
    **dict.fromkeys(["num_decoder_layers"], N_LAYERS),
    **dict.fromkeys(["encoder_layers", "num_encoder_layers"], 2),  # uneven: the decoder's own count is what counts
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_decoder_attention_heads", "mamba_num_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_kv_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["head_dim", "attention_head_dim", "global_head_dim", "swa_head_dim", "dim_head"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "qk_nope_head_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "index_head_dim", "d_kv", "conv_kernel_size"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 16),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"], 2 * D),
    **dict.fromkeys(["dim_ff", "ffn_hidden_size", "shared_expert_intermediate_size", "intermediate_size_mlp"], 2 * D),
    **dict.fromkeys(["num_encoder_ffn_dim", "shared_intermediate_size", "expert_ffn_hidden_size"], 2 * D),
    **dict.fromkeys(["moe_intermediate_size", "mlp_hidden_dim"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "index_topk"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx"], LIMIT),
    **dict.fromkeys(["sliding_window", "attention_chunk_size", "window_size", "local_attention"], 4),
    **dict.fromkeys(["original_max_position_embeddings"], LIMIT // 2),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input"], 8),
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The keywords that make a config small and free of dropout; what it derives from its sizes is left to it."""
    small: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            model_type = value["model_type"]
            small[key] = {"model_type": model_type, **shrunk(value), **OWN.get(model_type, {})}
        elif key in SIZES and value is not None:
            small[key] = SIZES[key]
        elif key.endswith("token_id") and isinstance(value, int) and value >= V:
            small[key] = V - 8
        elif "dropout" in key and value:
            small[key] = 0.0
    return small


# what a type needs beside small sizes; a list is several variants
MLA = {"head_dim": 8, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
SHARED_KEYS = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
DOTS3 = {
    **{
        key: SIZES[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "q_lora_rank")
    },
    **{key: SIZES[key] for key in ("moe_intermediate_size", "qk_rope_head_dim", "max_position_embeddings")},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"head_dim": 16, "v_head_dim": 8, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 2},
    **{"sliding_window": 4, "shared_experts_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 0},
    **{"eos_token_id": 0, "layer_types": ["indexed_attention", "indexed_attention", *["sliding_attention"] * 2]},
    "per_layer_config": {i: {"qk_nope_head_dim": 8, "kv_lora_rank": 16} for i in range(N_LAYERS)},
}
ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    **{"attention_hidden_size": 2 * D, "attention_head_dim": 16, "num_key_value_heads": 4},
}
ASSISTANT = {
    "text_config": {
        **{"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": N_LAYERS},
        "vocab_size_per_layer_input": 0,
        "pad_token_id": 0,
        **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        **{key: SIZES[key] for key in ("num_key_value_heads", "head_dim", "intermediate_size", "global_head_dim")},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
}
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    **dict.fromkeys(["blt_local_encoder", "blt_local_decoder"], {"hidden_size_global": D}),
    "gemma4_assistant": ASSISTANT,
    "gemma4_unified_assistant": {
        "text_config": {**ASSISTANT["text_config"], "model_type": "gemma4_unified_text"},
    },
    **dict.fromkeys(["bamba", "granitemoehybrid"], {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}),
    **dict.fromkeys(["codegen", "gptj"], {"rotary_dim": 4}),
    **dict.fromkeys(["axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v2", "deepseek_v3", "deepseek_v32"], MLA),
    **dict.fromkeys(["glm4_moe_lite", "glm_moe_dsa"], MLA),
    "glm_moe_dsa indices shared": {"indexer_types": ["full", "full", "shared", "shared"]},
    "inkling2_text": {"n_layers_per_attn_res_block": 2, "unpadded_vocab_size": V},
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe"], {"head_dim": 8}),
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": D, "adapter_out_dim": D},
    "dots3_note_audio_encoder": {"adapter_input_size": D, "adapter_out_dim": D},
    "dots3_note_text": DOTS3,
    "gemma3_text bidirectional": {"use_bidirectional_attention": True},
    "gemma3n_text": {
        "intermediate_size": [2 * D] * N_LAYERS,
        "activation_sparsity_pattern": [0.0] * N_LAYERS,
        **SHARED_KEYS,
    },
    "gemma4_text keys shared": SHARED_KEYS,
    **dict.fromkeys(["longcat_flash", "minicpm3", "youtu"], MLA),
    **dict.fromkeys(["ministral", "nemotron"], {"head_dim": 8, "num_key_value_heads": 2}),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "moe_shared_expert_intermediate_size": 16},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 64, "ple_embed_dim": 8},
        **{"heads_per_ngram": 2, "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 8},
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 6], "is_decoder": True},
    "rwkv halved": {"rescale_every": 2},
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys(["zamba", "zamba2"], ZAMBA),
    "zaya": {"num_experts_per_tok": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": 2 * D, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
}

# variants of a type that are models of another kind
EXTRA = [name for name in OWN if " " in name]


def variants(model_type: str) -> Iterator[tuple[str, Any]]:
    """(label, config) of a type: as it comes, and where there is the switch as a decoder."""
    from transformers import CONFIG_MAPPING

    config_class, own = CONFIG_MAPPING[model_type.split()[0]], OWN.get(model_type, {})
    try:
        config = config_class()
    except Exception:  # the type has no sizes of its own
        config = config_class(**own)
    base = shrunk(config.to_dict()) | OWN.get(model_type.split()[0], {}) | OWN.get(model_type, {})
    yield model_type, type(config)(**base)
    if getattr(config, "is_decoder", None) is False:
        yield f"{model_type} is_decoder", type(config)(**base | {"is_decoder": True})


def made_random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
            parameter.data += noise.to(parameter.dtype)
    return model.eval()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    mark = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=mark, eos_token=mark, model_max_length=10**9)


def stream(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def hooked(model: nn.Module, block: nn.Module, inputs: dict[str, Tensor], x_BLD: Tensor | None = None) -> Any:
    """(the block's output, logits) of a plain pass, the output replaced where x_BLD is given."""
    seen: list[Tensor] = []

    def hook(_block, _args, output):
        seen.append(stream(output).clone())
        if x_BLD is not None:
            x = x_BLD.to(seen[0].dtype)
            return x if isinstance(output, Tensor) else type(output)((x, *output[1:]))

    handle = block.register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits_BLV = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return seen[0], logits_BLV


def faults(folder: str, model: Any, base_folder: str | None) -> Iterator[str]:
    """What is not exact about a model that loads."""
    from dictionary_learning.model import load_model, model_shape

    lm, shape = load_model(folder), model_shape(folder)
    path = next(path for path, module in lm.model.named_modules() if module is lm.layers)
    if (shape.n_layers, shape.activation_dim) != (lm.n_layers, lm.activation_dim):
        yield f"shape {shape[:2]} is not {(lm.n_layers, lm.activation_dim)}"
    if lm.n_layers != N_LAYERS:
        yield f"{path} has {lm.n_layers} layers"
    layers = sorted(lm._outputs)
    if len(layers) < lm.n_layers:
        print(f"    {model.config.model_type}: text runs layers {layers} only", flush=True)
    blocks = model.get_submodule(path)
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(10, V - 20, (2, 11), generator=generator)
    mask_BL = torch.ones_like(tokens_BL)
    inputs = {"input_ids": tokens_BL, "attention_mask": mask_BL}
    logits_BLV, x_by_layer = lm.run(tokens_BL, mask_BL, layers)
    if not logits_BLV.isfinite().all():
        yield "the logits are not finite, nothing is shown"
    changed_BL = tokens_BL.clone()
    changed_BL[:, -1] = (changed_BL[:, -1] + 1) % (V - 40) + 5
    later = lm.activations(changed_BL, mask_BL, layers)
    for layer in layers:
        x_BLD, expected_BLV = hooked(model, blocks[layer], inputs)
        if not torch.equal(x_by_layer[layer], x_BLD):
            yield f"layer {layer}: activations are not a hook's"
        if not torch.equal(logits_BLV, expected_BLV):
            yield f"layer {layer}: logits are not the model's"
        if not torch.allclose(later[layer][:, :-1], x_BLD[:, :-1], atol=1e-4, rtol=1e-3):
            yield f"layer {layer}: not causal"
        if not torch.equal(lm.run_from(layer, x_BLD, tokens_BL, mask_BL), expected_BLV):
            yield f"layer {layer}: its own activations do not give its logits"
        noise_BLD = torch.randn(x_BLD.shape, generator=generator)
        _, expected_BLV = hooked(model, blocks[layer], inputs, noise_BLD)
        if not torch.equal(lm.run_from(layer, noise_BLD, tokens_BL, mask_BL), expected_BLV):
            yield f"layer {layer}: run_from is not the model with that block's output replaced"
        for kind, name in [("", folder), (" (base file)", base_folder)]:
            if name is not None and layer in (layers[0], layers[-1]):
                cut = load_model(name, last_layer=layer).activations(tokens_BL, mask_BL, [layer])
                if not torch.equal(cut[layer], x_BLD):
                    yield f"layer {layer}: a truncated load differs{kind}"
    half = load_model(folder, dtype=torch.bfloat16)
    logits_BLV, x_by_layer = half.run(tokens_BL, mask_BL, layers)
    for layer in layers:
        if not torch.equal(half.run_from(layer, x_by_layer[layer], tokens_BL, mask_BL), logits_BLV):
            yield f"layer {layer}: in bf16 its own activations do not give its logits"
    length = min(shape.context_limit or 4 * LIMIT, 4 * LIMIT)
    long_BL = torch.randint(10, V - 20, (1, length), generator=generator)
    try:
        lm.run(long_BL, torch.ones_like(long_BL), [])
    except Exception as error:
        yield f"a context of {length} (limit {shape.context_limit}): {type(error).__name__}"


def in_span(y: Tensor, *parts: Tensor) -> bool:
    """Whether y is a sum of multiples of the parts."""
    A = torch.stack([part.double().flatten() for part in parts], 1)
    rest = y.double().flatten() - A @ torch.linalg.lstsq(A, y.double().flatten()[:, None]).solution[:, 0]
    return bool(rest.norm() < 1e-4 * y.double().norm())


def site_faults(folder: str, model: Any, base_folder: str | None) -> Iterator[str]:
    """What is not exact about the sites of a model that loads; prints what its layers lack."""
    from dictionary_learning.model import load_model
    from dictionary_learning.sites import SITES, Tap, attach

    lm = load_model(folder)
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(10, V - 20, (2, 11), generator=generator)
    mask_BL = torch.ones_like(tokens_BL)
    inputs = {"input_ids": tokens_BL, "attention_mask": mask_BL, "use_cache": False}
    lacking: dict[str, list[int]] = {}
    for layer in sorted(lm._outputs):
        places = {}
        for site in SITES:
            try:
                lm.point(Tap(layer, site))
                places[site] = Tap(layer, site)
            except ValueError as error:
                lacking.setdefault(str(error).split(": ", 1)[1].replace(f".{layer}.", ".L."), []).append(layer)
        logits_BLV, x_by_place = lm.run(tokens_BL, mask_BL, [*places.values(), *range(layer)])
        x = {site: x_by_place[place] for site, place in places.items()}
        outs = [x[site] for site in ("attn_out", "mlp_out") if site in x]
        # some blocks add the output of a state-space mixer too, or a part of the embedding
        one_mixer, one_mlp = (len(calls) == 1 for calls in (lm._anatomies[layer].mixers, lm._anatomies[layer].mlps))
        if len(outs) == 2 and one_mixer and one_mlp and not in_span(x["resid_post"], x["resid_pre"], *outs):
            yield f"layer {layer}: its parts do not add up"
        if "resid_mid" in x and one_mixer and not in_span(x["resid_mid"], x["resid_pre"], x["attn_out"]):
            yield f"layer {layer}: resid_mid is not what attention adds up to"
        below = x_by_place.get(layer - 1)
        cut = load_model(folder, last_layer=layer).activations(tokens_BL, mask_BL, list(places.values()))
        for site, place in places.items():
            if not torch.equal(cut[place], x[site]):
                yield f"layer {layer}: {site} of a truncated load differs"
            if not torch.equal(lm.run_from(place, x[site], tokens_BL, mask_BL, below), logits_BLV):
                yield f"layer {layer}: its own {site} does not give its logits"
            noise_BLW = torch.randn(x[site].shape, generator=generator)
            remove = attach(lm.point(place), lambda _, noise_BLW=noise_BLW: noise_BLW)
            with torch.no_grad():
                expected_BLV = lm.model(**inputs).logits
            remove()
            if torch.equal(expected_BLV, logits_BLV):
                yield f"layer {layer}: {site} is not read by what is above"
            if not torch.equal(lm.run_from(place, noise_BLW, tokens_BL, mask_BL, below), expected_BLV):
                yield f"layer {layer}: run_from is not the model with {site} replaced"
    for why, layers in lacking.items():
        print(f"    {model.config.model_type} layers {layers}: {why}", flush=True)


def not_made(config: Any, folder: Path, error: Exception) -> tuple[str, str]:
    """(verdict, why) where transformers makes no model: to be refused if it makes none in the type's own sizes."""
    from transformers import AutoModelForCausalLM

    from dictionary_learning.model import model_shape

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(type(config)())
        return "no model", f"{type(error).__name__}: {error}"[:300]
    except Exception:
        config.save_pretrained(folder)
    try:
        model_shape(str(folder))
    except ValueError as refusal:
        return "refused", str(refusal).replace(str(folder), "")
    return "wrong", "a shape of no model"


def tried(label: str, make: Callable[[], Any], faults: Callable[..., Iterator[str]] = faults) -> tuple[str, str, str]:
    """(label, exact | refused | wrong, why)"""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        whole, base = Path(folder, "whole"), Path(folder, "base")
        try:
            with torch.device("meta"):
                n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(make()).parameters())
            assert n_parameters < 2e7, f"{n_parameters:,} parameters"
            model = made_random(AutoModelForCausalLM.from_config(make()))
            model.save_pretrained(whole)
            # one more load, so that what is compared with is what the files say
            config = AutoConfig.from_pretrained(whole)
            if type(config) not in AutoModelForCausalLM._model_mapping:
                make().save_pretrained(whole)
            model = AutoModelForCausalLM.from_pretrained(whole).eval()
            tokenizer().save_pretrained(whole)
            has_base = model.base_model is not model
            if has_base:
                model.base_model.save_pretrained(base)
                tokenizer().save_pretrained(base)
                (base / "config.json").write_bytes((whole / "config.json").read_bytes())
            tokens_BL = torch.arange(20, 26).view(2, 3)
            with torch.no_grad():
                model(tokens_BL, attention_mask=torch.ones_like(tokens_BL), use_cache=False)
        except Exception as error:
            return (label, *not_made(make(), whole, error))
        try:
            found = list(faults(str(whole), model, str(base) if has_base else None))
        except ValueError as error:
            return label, "refused", str(error).replace(folder, "")
        except Exception as error:
            return label, "wrong", "".join(traceback.format_exception(error)[-3:])
    return label, "wrong" if found else "exact", "; ".join(found)


def tried_type(model_type: str, faults: Callable[..., Iterator[str]] = faults) -> list[tuple[str, str, str]]:
    try:
        configs = list(variants(model_type))
    except Exception as error:
        return [(model_type, "no model", f"config: {type(error).__name__}: {error}"[:300])]
    return [tried(label, lambda config=config: config, faults) for label, config in configs]


def quiet() -> None:
    from transformers import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (all)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--sites", action="store_true", help="look at the places inside the blocks")
    args = parser.parse_args()
    look = partial(tried_type, faults=site_faults if args.sites else faults)
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor(args.jobs, initializer=quiet) as pool:
        for results in pool.map(look, args.types or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *EXTRA]):
            for label, verdict, why in results:
                counts[verdict] += 1
                print(f"{label:32} {verdict:8} {why}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))


if __name__ == "__main__":
    main()
