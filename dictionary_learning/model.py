"""Any causal language model of transformers: load it, cut it short, read its residual stream and write into it.

B texts, L positions, V vocabulary, D activation_dim. A layer's activations are the output of its block, the residual
stream after it. Layers are found by what they are (the decoder's list of `num_hidden_layers` blocks), never by
the model's name.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BUILT_IN = {"tiny-python": Path(__file__).parent / "assets" / "tiny-python"}


def resolve_device(name: str | None = None) -> torch.device:
    """The device asked for, else the best there is: cuda, then mps, then cpu.

    Raises ValueError where the device does not exist here. Cheap, so ask before anything is downloaded.
    """
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name is None:
        return torch.device(there[0].split(":")[0])
    if name not in there and name not in {device.split(":")[0] for device in there}:
        raise ValueError(f"there is no device {name!r} here, only {', '.join(there)}")
    return torch.device(name)


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """What transformers and the Hub raise about a model, as one ValueError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        cause, page = error.__cause__, f"https://huggingface.co/{name}"
        if isinstance(cause, errors.GatedRepoError):
            why = f"it is gated: accept its licence at {page}, then run `hf auth login`"
        elif isinstance(cause, errors.RepositoryNotFoundError | errors.HFValidationError):
            why = "it is neither a folder here nor a model on the Hub (if it is private, run `hf auth login`)"
        elif isinstance(cause, errors.RevisionNotFoundError):
            why = f"it has no such revision, see {page}"
        elif isinstance(error, ConnectionError) or isinstance(cause, errors.LocalEntryNotFoundError | ConnectionError):
            why = "the Hub cannot be reached, and the model is neither in the local cache nor a folder here"
        elif "trust_remote_code" in str(error):
            why = "it runs code of its own: read that first, then pass trust_remote_code to allow it"
        else:
            why = " ".join(re.split(r"(?<=\.)\s+", str(error))[:2])
        raise ValueError(f"cannot load {name!r}: {why.rstrip('.')}") from error


def _source(name: str) -> str:
    return str(BUILT_IN.get(name, name))


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a Hub id, a local folder or the built-in model. ValueError where there is none."""
    from transformers import AutoTokenizer

    with _one_sentence(name):
        tokenizer = AutoTokenizer.from_pretrained(_source(name), revision=revision, trust_remote_code=trust_remote_code)
    if set(tokenizer("text").input_ids) <= set(tokenizer.all_special_ids):  # made from the config, with no vocabulary
        raise ValueError(f"cannot load {name!r}: it has no tokenizer")
    return tokenizer


def _skeleton(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The whole model on the meta device: every module, no memory and no download but the config's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _one_sentence(name):
        config = AutoConfig.from_pretrained(_source(name), revision=revision, trust_remote_code=trust_remote_code)
    if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
        raise ValueError(f"{name!r} is of type {config.model_type}, which is no causal language model of transformers")
    with _one_sentence(name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _layers_path(model: Any, name: str) -> str:
    """Where the blocks are in the model, as a module path: the decoder's shallowest list of `num_hidden_layers`."""
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    lists = {path: len(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    inside = {path for path, m in model.named_modules() if any(m is inner for inner in decoder.modules())}
    found = [path for path, length in lists.items() if length == n_layers and path in inside]
    if not found:
        have = ", ".join(f"{path} ({length})" for path, length in lists.items()) or "none"
        raise ValueError(f"found no list of {n_layers} layers in {name!r}; its module lists are: {have}")
    return min(found, key=lambda path: path.count("."))


def _check_layer(layer: int, n_layers: int, name: str) -> None:
    if not 0 <= layer < n_layers:
        raise ValueError(f"model {name} has {n_layers} layers (0 to {n_layers - 1}), not {layer}")


def _cut(model: Any, layers_path: str, last_layer: int) -> None:
    """Remove the blocks after `last_layer` and all that is outside the decoder, unless its weights are tied to it.

    The config stays as it is: editing it breaks models that plan their layers or their cache from it.
    """
    layers = model.get_submodule(layers_path)
    parent, _, attribute = layers_path.rpartition(".")
    removed = [f"{attribute}.{i}" for i in range(last_layer + 1, len(layers))]
    setattr(model.get_submodule(parent), attribute, layers[: last_layer + 1])

    tied = [key for pair in model.all_tied_weights_keys.items() for key in pair]
    decoder_path = next(path for path, module in model.named_modules() if module is model.get_decoder())
    module, path = model, ""
    for part in decoder_path.split(".") if decoder_path else []:
        for child in [child for child, _ in module.named_children() if child != part]:
            if not any(key.startswith(f"{path}{child}.") for key in tied):
                setattr(module, child, nn.Identity())
                removed.append(child)
        module, path = getattr(module, part), f"{path}{part}."

    # from_pretrained keeps quiet about the weights that we left out, and about no others
    model._keys_to_ignore_on_load_unexpected |= {rf"(^|\.){re.escape(child)}\." for child in removed}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    pairs = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {target: source for target, source in pairs if {target, source} <= names}


def _truncated(model_class: Any, layers_path: str, last_layer: int) -> Any:
    """The model's class without what `_cut` removes.

    transformers constructs models on the meta device and then reads the parameters they have from the files, so
    the weights of what is cut in the constructor are never read.
    """

    def __init__(self, config, *args, **kwargs):
        model_class.__init__(self, config, *args, **kwargs)
        _cut(self, layers_path, last_layer)

    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


class ModelShape(NamedTuple):
    """What a model's config tells without its weights."""

    n_layers: int
    activation_dim: int
    vocab_size: int
    context_limit: int | None  # tokens; None where the config names no limit
    n_parameters: int  # of what `load_model` would load


def model_shape(
    name: str, *, last_layer: int | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> ModelShape:
    """The sizes of a model, and of the part of it that `load_model(name, last_layer=last_layer)` loads.

    Raises ValueError as `load_model` does; downloads the config alone.
    """
    model = _skeleton(name, revision, trust_remote_code)
    config = model.config.get_text_config(decoder=True)
    path = _layers_path(model, name)
    if last_layer is not None:
        _check_layer(last_layer, config.num_hidden_layers, name)
        _cut(model, path, last_layer)
    return ModelShape(
        n_layers=config.num_hidden_layers,
        activation_dim=config.hidden_size,
        vocab_size=config.vocab_size,
        context_limit=getattr(config, "max_position_embeddings", None),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def load_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    last_layer: int | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "LanguageModel":
    """A causal LM and its tokenizer.

    name: a Hub id, a local folder, or "tiny-python".
    last_layer: with k, only what layers 0 to k need takes memory (no later block, no unembedding), so `activations`
        is all the model can do; None loads everything.
    Raises ValueError for a model that is not there or not open to the user, that is no causal LM, whose layers are
    not found, that has no such layer, or whose files lack weights.
    """
    skeleton = _skeleton(name, revision, trust_remote_code)
    path, model_class = _layers_path(skeleton, name), type(skeleton)
    if last_layer is not None:
        _check_layer(last_layer, skeleton.config.get_text_config(decoder=True).num_hidden_layers, name)
        model_class = _truncated(model_class, path, last_layer)
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _one_sentence(name):
        model, info = model_class.from_pretrained(
            _source(name),
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"the files of {name!r} lack {len(missing)} weights of the model, such as {missing[0]}")
    return LanguageModel(model.to(device), tokenizer, name, layers_path=path, last_layer=last_layer)


class _Stop(Exception):
    """Ends a forward pass at the deepest layer that was asked for."""


def _with_stream(output: Any, x_BLD: Tensor) -> Any:
    """A block's output with another residual stream, in the same container."""
    return type(output)((x_BLD, *output[1:])) if isinstance(output, tuple | list) else x_BLD


class LanguageModel:
    """A causal LM whose layers can be read and overwritten. Nothing here builds a graph for autograd.

    tokens_BL are token ids, mask_BL is 0 where there is no text; both may be on any device. Results are on the model's.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, *, layers_path: str | None = None, last_layer: int | None = None
    ):
        config = model.config.get_text_config(decoder=True)
        self.model, self.tokenizer, self.name, self.last_layer = model.eval(), tokenizer, name, last_layer
        self.layers: nn.ModuleList = model.get_submodule(layers_path or _layers_path(model, name))
        self.n_layers: int = config.num_hidden_layers
        self.activation_dim: int = config.hidden_size
        # upper blocks that read keys and values of lower ones (gemma-3n, gemma-4) need those to run
        self._shares_keys = bool(getattr(config, "num_kv_shared_layers", 0))

        eos = tokenizer.eos_token_id
        bos_id = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        pad_id = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if bos_id is None or pad_id is None:
            raise ValueError(f"the tokenizer of {name!r} has no eos token to begin, join and pad texts with")
        self.bos_id: int = bos_id
        self.pad_id: int = pad_id

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def _inputs(self, tokens_BL: Tensor, mask_BL: Tensor) -> dict[str, Any]:
        mask_BL = mask_BL.to(self.device, torch.bool).long()
        return {"input_ids": tokens_BL.to(self.device), "attention_mask": mask_BL, "use_cache": False}

    @contextmanager
    def _captured(self, layers: Iterable[int], stop: bool = False) -> Iterator[dict[int, Tensor]]:
        """Collects each layer's activations while the model runs; with stop, ends the run after the deepest."""
        layers = sorted(set(layers))
        for layer in layers:
            _check_layer(layer, self.n_layers, self.name)
        x_by_layer: dict[int, Tensor] = {}

        def hook(layer: int):
            def keep(_block, _args, output) -> None:
                x = output[0] if isinstance(output, tuple | list) else output
                if x.ndim != 3 or x.shape[-1] != self.activation_dim:
                    raise ValueError(f"layer {layer} of {self.name} has no single residual stream: {list(x.shape)}")
                x_by_layer[layer] = x
                if stop and layer == layers[-1]:
                    raise _Stop

            return keep

        with ExitStack() as stack:
            for layer in layers:
                stack.callback(self.layers[layer].register_forward_hook(hook(layer)).remove)
            yield x_by_layer

    @torch.no_grad()
    def activations(self, tokens_BL: Tensor, mask_BL: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
        """{layer: x_BLD}, the residual stream after each asked block, from one pass that ends at the deepest."""
        with self._captured(layers, stop=True) as x_by_layer, suppress(_Stop):
            self.model.get_decoder()(**self._inputs(tokens_BL, mask_BL))
        return x_by_layer

    @torch.no_grad()
    def run(self, tokens_BL: Tensor, mask_BL: Tensor, layers: Iterable[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """(logits_BLV, {layer: x_BLD}) of the whole model, in one pass."""
        assert self.last_layer is None, "the model was loaded without its upper layers"
        with self._captured(layers) as x_by_layer:
            logits_BLV = self.model(**self._inputs(tokens_BL, mask_BL)).logits
        return logits_BLV, x_by_layer

    @cached_property
    def _outputs(self) -> list[Any]:
        """What each block returns for one token: the containers that stand-ins for the blocks have to return."""
        outputs: list[Any] = []
        token_BL = torch.zeros(1, 1, dtype=torch.long)
        with ExitStack() as stack:
            for block in self.layers:
                hook = block.register_forward_hook(lambda _block, _args, output: outputs.append(output))
                stack.callback(hook.remove)
            self.model.get_decoder()(**self._inputs(token_BL, torch.ones_like(token_BL)))
        return outputs

    @torch.no_grad()
    def run_from(self, layer: int, x_BLD: Tensor, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """logits_BLV of the whole model, the output of block `layer` being x_BLD (cast to the model's dtype).

        The model's own code runs, so masks, positions, norm and unembedding are its own; only the blocks up to
        `layer` are replaced for the call, by ones that do nothing.
        """
        assert self.last_layer is None, "the model was loaded without its upper layers"
        _check_layer(layer, self.n_layers, self.name)
        x_BLD = x_BLD.to(self.device, self.dtype)
        with ExitStack() as stack:
            if self._shares_keys:
                hook = self.layers[layer].register_forward_hook(lambda _b, _a, output: _with_stream(output, x_BLD))
                stack.callback(hook.remove)
            else:
                for block, output in zip(self.layers[: layer + 1], self._outputs, strict=False):
                    stack.enter_context(_returning(block, _with_stream(output, x_BLD)))
            return self.model(**self._inputs(tokens_BL, mask_BL)).logits


@contextmanager
def _returning(block: nn.Module, output: Any) -> Iterator[None]:
    """Within this, the block computes nothing and returns `output`."""
    own = block.__dict__.get("forward")  # set on the instance by some wrappers, otherwise the class's
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
