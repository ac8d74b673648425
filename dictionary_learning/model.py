"""Any causal language model of transformers: load it, cut it short, read its activations and write into them.

B texts, L positions, V vocabulary, D activation_dim, W the width of a place. A layer's activations are the output of
its block, the residual stream after it; its other places are found by `sites`. Layers are found by what they are (the
decoder's list of blocks), never by the model's name, and one short pass on loading makes sure of what reading and
writing them takes for granted.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .pretrained import BUILT_IN as BUILT_IN
from .pretrained import Pretrained, one_sentence
from .pretrained import model_identity as model_identity
from .pretrained import needs_extra as needs_extra
from .pretrained import same_model as same_model
from .sites import (
    SITES,
    Anatomy,
    Place,
    Point,
    attach,
    in_order,
    point_of_module,
    stream_of,
    tap_of,
    with_stream,
    words_of,
)
from .threads import workers
from .tokenizer import as_ids, check_token_ids, text_marks, tokenizer_of
from .tokenizer import generation_eos_ids as generation_eos_ids
from .tokenizer import load_tokenizer as load_tokenizer

# what configs call the number of positions that a model has
CONTEXT_LIMITS = (
    *("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len", "max_seq_length"),
    *("max_sequence_length", "seq_length", "context_length"),
)


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


def _skeleton(model: Pretrained) -> Any:
    """The whole model on the meta device: every module, no memory and no download but the config's."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import meta_device_safe_creation_ops

    model.check_kind()
    with model.one_sentence():
        config = AutoConfig.from_pretrained(model.source, **model.options)
    kind = AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping and type(config) not in kind._model_mapping:
        kind = AutoModelForImageTextToText  # whose text side is a causal language model
    if type(config) not in kind._model_mapping and not hasattr(config, "auto_map"):
        what = f"is of type {config.model_type}, which is no causal language model of transformers"
        raise ValueError(f"{model.name!r} {what}")
    with model.one_sentence(), torch.device("meta"), meta_device_safe_creation_ops():
        trust = model.options["trust_remote_code"]
        return kind.from_config(config, trust_remote_code=trust)


def _decoder(model: Any) -> Any:
    """The part of the model that has the blocks. What some models call their decoder is the output layer."""
    decoder = model.get_decoder()
    return decoder if any(isinstance(module, nn.ModuleList) for module in decoder.modules()) else model.base_model


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, candidate in model.named_modules() if candidate is module)


def _layers_path(model: Any) -> str:
    """Where the blocks are in the model, as a module path: the shallowest module list of the decoder, the largest
    where there are several."""
    lists = [m for m in _decoder(model).modules() if isinstance(m, nn.ModuleList) and len(m)]
    paths = {_path(model, m): sum(p.numel() for p in m.parameters()) for m in lists}
    if not paths:
        raise ValueError("its decoder has no list of layers")
    return min(paths, key=lambda path: (path.count("."), -paths[path]))


def _width(model: Any) -> int:
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    if width is None:
        raise ValueError("its config has no hidden_size, so there is no single residual stream")
    return width


def _n_embeddings(model: Any) -> int:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return model.config.get_text_config(decoder=True).vocab_size if weight is None else len(weight)


def _context_limit(model: Any) -> int | None:
    """The most positions that a context may have; None where neither config nor position embeddings name a limit."""
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, name, None) for name in CONTEXT_LIMITS]
    for path, module in _decoder(model).named_modules():
        # RoBERTa's positions begin after the one of padding, and rows for them are counted in the config's limit
        if isinstance(module, nn.Embedding) and "position" in path and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def check_context(length: int, limit: int | None, name: str) -> None:
    """ValueError where contexts are longer than what the model of this name can read."""
    if limit is not None and length > limit:
        raise ValueError(f"--context_length {length} is more than the {limit} tokens {name} can read.")


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
    decoder_path = _path(model, _decoder(model))
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
    model = _skeleton(Pretrained(name, revision, trust_remote_code))
    with one_sentence(name):
        sizes = {"activation_dim": _width(model), "vocab_size": model.config.get_text_config(decoder=True).vocab_size}
        path, limit = _layers_path(model), _context_limit(model)
    n_layers = len(model.get_submodule(path))
    if last_layer is not None:
        _check_layer(last_layer, n_layers, name)
        _cut(model, path, last_layer)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(n_layers=n_layers, context_limit=limit, n_parameters=n_parameters, **sizes)


def load_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    last_layer: int | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    device_map: str | None = None,
) -> "LanguageModel":
    """A causal LM and its tokenizer.

    name: a Hub id, a local folder, or "tiny-python".
    last_layer: with k, only what layers 0 to k need takes memory (no later block, no unembedding), so `activations`
        is all the model can do; None loads everything.
    quantization: "8bit" or "4bit", by bitsandbytes. device_map: "auto" spreads the model over all devices, by
        accelerate; `device` then plays no part.
    Raises ValueError for a model that is not there or not open to the user, that is no causal LM, whose layers are
    not found, that has no such layer, whose blocks do not hand on one residual stream, whose files lack weights or
    have some of other sizes, or whose tokenizer has more tokens than it.
    """
    origin = Pretrained(name, revision, trust_remote_code)
    skeleton = _skeleton(origin)
    with origin.one_sentence():
        path, model_class, n_embeddings = _layers_path(skeleton), type(skeleton), _n_embeddings(skeleton)
    n_layers = len(skeleton.get_submodule(path))
    if last_layer is not None:
        _check_layer(last_layer, n_layers, name)
        model_class = _truncated(model_class, path, last_layer)
    tokenizer = tokenizer_of(origin)
    check_token_ids(tokenizer, n_embeddings, name)
    options = _placement(device, dtype, quantization, device_map)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with origin.one_sentence():
        model, info = model_class.from_pretrained(
            origin.source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, in one sentence
            **origin.options,
            **options,
        )
    if origin.adapter is not None:
        model = _with_adapter(model, origin, skeleton)
    if info["mismatched_keys"]:
        key, found, wanted = sorted(info["mismatched_keys"])[0]
        sizes = f"{list(found)} where the config says {list(wanted)}"
        raise ValueError(f"the files of {name!r} do not fit its config.json: {key} is {sizes}")
    with _entered() as entered:
        lm = LanguageModel(
            model if options.get("device_map") else model.to(device),
            tokenizer,
            name,
            layers_path=path,
            last_layer=last_layer,
            n_layers=n_layers,
        )
    missing = sorted(info["missing_keys"])
    if last_layer is not None:  # files of a base model lack what is beside or above the blocks
        blocks = set(lm.layers.modules())
        owners = {key: model.get_submodule(key.rpartition(".")[0]) for key in missing}
        missing = [key for key, owner in owners.items() if owner in entered or owner in blocks]
    if missing:
        raise ValueError(f"the files of {name!r} lack {len(missing)} weights of the model, such as {missing[0]}")
    return lm


def _placement(
    device: str | torch.device, dtype: torch.dtype, quantization: str | None, device_map: str | None
) -> dict[str, Any]:
    """What `from_pretrained` is told of where the weights go and in which form; ValueError without the packages."""
    if device_map is not None:
        needs_extra("accelerate", "device_map", f"--device_map {device_map}")
    if quantization is None:
        return {} if device_map is None else {"device_map": device_map}
    for package in ("bitsandbytes", "accelerate"):
        needs_extra(package, "quantization", f"--quantization {quantization}")
    from transformers import BitsAndBytesConfig

    form: dict[str, Any] = {f"load_in_{quantization}": True}
    if quantization == "4bit":
        form["bnb_4bit_compute_dtype"] = dtype
    # quantised weights cannot be moved afterwards
    return {"device_map": device_map or {"": str(device)}, "quantization_config": BitsAndBytesConfig(**form)}


def _with_adapter(model: Any, origin: Pretrained, skeleton: Any) -> Any:
    """The model with the weights of its adapter merged in; of layers that were cut, the adapter's are left out.

    skeleton: the whole model. ValueError where none of the adapter's weights belongs to it; some are warned about.
    """
    needs_extra("peft", "adapters", f"{origin.name!r} is a PEFT adapter (LoRA), which")
    from peft import PeftModel  # pyright: ignore[reportMissingImports]
    from peft.utils import load_peft_weights  # pyright: ignore[reportMissingImports]

    with origin.one_sentence():
        names = list(load_peft_weights(str(origin.adapter), device="cpu"))
    strange = [name for name in names if not _names_module(skeleton, name)]
    if len(strange) == len(names):
        what = f"has no weights of {origin.source}" + (f", but such as {strange[0]}" if strange else "")
        raise ValueError(f"cannot load {origin.name!r}: the adapter {what}")
    if strange:
        what = f"{len(strange)} of the {len(names)} weights of the adapter {origin.name}"
        warnings.warn(f"{what} belong to no module of {origin.source}, such as {strange[0]}: left out", stacklevel=3)
    if not any(_names_module(model, name) for name in names):
        return model  # all of them are of layers that were cut
    with origin.one_sentence():
        return PeftModel.from_pretrained(model, str(origin.adapter)).merge_and_unload()


def _names_module(model: nn.Module, name: str) -> bool:
    """Whether what an adapter calls so belongs to a module of the model that has no others in it."""
    module = model
    for part in name.removeprefix("base_model.model.").split("."):
        inner = dict(module.named_children())
        if part not in inner:
            break
        module = inner[part]
    return module is not model and not any(module.children())


@contextmanager
def _entered() -> Iterator[set[nn.Module]]:
    """The modules that run within this."""
    modules: set[nn.Module] = set()
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _args: modules.add(module))
    try:
        yield modules
    finally:
        hook.remove()


# On the CPU a batch of text is run in parts of about so many tokens, whose activations stay in the cache: one thread
# takes 0.8 of the time of the whole batch for the built-in model's 4096.
PART_TOKENS = 2048


class _Stop(Exception):
    """Ends a forward pass at the deepest layer that was asked for."""


def _is(value: Any, x_BLD: Tensor) -> bool:
    """Whether a block that is given `value` reads the stream x_BLD, or a multiple: RWKV halves it every few blocks."""
    if value is x_BLD or not (isinstance(value, Tensor) and value.shape == x_BLD.shape):
        return value is x_BLD
    value, x = value.float().flatten(), x_BLD.float().flatten()
    return bool((value - (value @ x) / (x @ x) * x).norm() <= 0.01 * value.norm())


class LanguageModel:
    """A causal LM whose layers can be read and overwritten. Nothing here builds a graph for autograd.

    tokens_BL are token ids, mask_BL is 0 where there is no text; both may be on any device. Results are on the model's.

    Raises ValueError for a model whose blocks do not each return one residual stream (B, L, D) and hand it on to the
    next, or in which a later token changes what comes before it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        layers_path: str | None = None,
        last_layer: int | None = None,
        n_layers: int | None = None,
    ):
        self.model, self.tokenizer, self.name, self.last_layer = model.eval(), tokenizer, name, last_layer
        with one_sentence(name):
            self._layers_path = layers_path or _layers_path(model)
            self.layers: nn.ModuleList = model.get_submodule(self._layers_path)
        self.n_layers: int = n_layers or len(self.layers)
        eos_ids = as_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
        self.bos_id, self.separator_id, self.pad_id = text_marks(tokenizer, eos_ids)
        self.n_embeddings = _n_embeddings(model)
        # of a cut model there is no more than the decoder
        self._forward = model if last_layer is None else _decoder(model)
        self._stand_ins: dict[int, list[Any]] = {}  # by layer, what the blocks up to it return where they are replaced
        self._points: dict[Place, Point] = {}
        self._anatomies: dict[int, Anatomy] = {}
        with one_sentence(name):
            self.activation_dim: int = _width(model)
            self._outputs = self._probe()  # what each block returns; of those that text does not run, nothing
        self._check_layers([] if last_layer is None else [last_layer])
        self._copies: list[LanguageModel] = []

    def copies(self, n: int) -> list["LanguageModel"]:
        """Itself and others, to be used by n threads at the same time: the same weights, in modules of their own, since
        reading and overwriting put hooks on the modules. Itself alone where the model's code does not let it be copied.
        """
        shared = {id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers())}
        while len(self._copies) < n - 1:
            other = copy.copy(self)
            try:
                other.model = copy.deepcopy(self.model, dict(shared))
            except Exception:  # whatever it holds that cannot be copied
                return [self]
            other.layers = other.model.get_submodule(self._layers_path)
            other._forward = other.model if self.last_layer is None else _decoder(other.model)
            other._points, other._anatomies, other._copies = {}, {}, []
            self._copies.append(other)
        return [self, *self._copies[: n - 1]]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context_limit(self) -> int | None:
        return _context_limit(self.model)

    def _inputs(self, tokens_BL: Tensor, mask_BL: Tensor) -> dict[str, Any]:
        highest = int(tokens_BL.max())
        if highest >= self.n_embeddings:
            what = f"the text has the token id {highest}, but {self.name} embeds only {self.n_embeddings}"
            raise ValueError(f"{what}: take the tokenizer (and chat template) that the model was trained with")
        mask_BL = mask_BL.to(self.device, torch.bool).long()
        return {"input_ids": tokens_BL.to(self.device), "attention_mask": mask_BL, "use_cache": False}

    def _ordinary_ids(self) -> Tensor:
        """The token ids that are not special to the tokenizer or to the model."""
        config = self.model.config.get_text_config(decoder=True)
        settings = {**vars(self.model.config), **vars(config)}
        special = {i for key, value in settings.items() if key.endswith("token_id") for i in as_ids(value)}
        special |= {self.bos_id, self.separator_id, self.pad_id, *getattr(self.tokenizer, "all_special_ids", ())}
        return torch.tensor([i for i in range(self.n_embeddings) if i not in special])

    def _probe_inputs(self) -> dict[str, Any]:
        """Two texts of three tokens that differ in their last token alone."""
        ids = self._ordinary_ids()
        tokens_BL = ids[[len(ids) // 2, len(ids) // 3, 0]].repeat(2, 1)
        tokens_BL[1, 2] = ids[-1]
        return self._inputs(tokens_BL, torch.ones_like(tokens_BL))

    @torch.no_grad()
    def _probe(self) -> dict[int, Any]:
        """{layer: what its block returns} for the two texts of the probe.

        Raises ValueError where that is not what reading and overwriting the residual stream takes.
        """
        outputs: dict[int, Any] = {}

        def enter(layer: int):
            def check(_block, args, kwargs) -> None:
                before = max(outputs, default=-1)
                if layer <= before:
                    raise ValueError(
                        f"its blocks do not run once and in order, layer {layer} runs after layer {before}"
                    )
                given = (*args, *kwargs.values())
                if outputs and not any(_is(value, stream_of(outputs[before])) for value in given):
                    raise ValueError(f"its layer {layer} does not read what layer {before} returns")

            return check

        def leave(layer: int):
            def keep(_block, _args, output) -> None:
                x = stream_of(output)
                if not isinstance(x, Tensor):
                    raise ValueError(f"its layer {layer} returns no residual stream but a {type(x).__name__}")
                if x.shape != (2, 3, self.activation_dim):
                    what = f"{list(x.shape)} for 2 texts of 3 tokens and a hidden size of {self.activation_dim}"
                    raise ValueError(f"its layer {layer} returns no single residual stream: {what}")
                outputs[layer] = output
                if layer == self.last_layer:
                    raise _Stop

            return keep

        with ExitStack() as stack, suppress(_Stop):
            for layer, block in enumerate(self.layers):
                stack.callback(block.register_forward_pre_hook(enter(layer), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave(layer)).remove)
            output = self._forward(**self._probe_inputs())
            if self.last_layer is None and output.logits.shape[:2] != (2, 3):
                raise ValueError(f"its logits are {list(output.logits.shape)} for 2 texts of 3 tokens")
        if not outputs:
            raise ValueError("text runs none of its layers")
        for layer, output in outputs.items():
            x_BLD = stream_of(output)[:, :2].float()
            changed = (x_BLD[0] - x_BLD[1]).norm(dim=-1) / x_BLD[0].norm(dim=-1)
            if changed.max() > max(1e-5, 4 * torch.finfo(self.dtype).eps):
                what = f"a token changes what layer {layer} computes for the tokens before it"
                is_encoder = getattr(self.model.config, "is_decoder", None) is False
                advice = " (a decoder's config.json says is_decoder: true)" if is_encoder else ""
                raise ValueError(f"it is no causal language model: {what}{advice}")
        return outputs

    def _check_layers(self, layers: Iterable[int]) -> None:
        for layer in layers:
            _check_layer(layer, self.n_layers, self.name)
            assert self.last_layer is None or layer <= self.last_layer, "the model was loaded without this layer"
            if layer not in self._outputs:
                raise ValueError(f"text does not run layer {layer} of {self.name}, only layers {sorted(self._outputs)}")

    def point(self, place: Place) -> Point:
        """Where the activations of a place pass by; ValueError where the model has no such place."""
        layer, site = tap_of(place)
        self._check_layers([layer])
        if isinstance(place, int):
            return Point(self.layers[layer], "output", self.activation_dim)
        if place not in self._points:
            with torch.no_grad(), one_sentence(self.name, doing=f"read {words_of(place)} of"):
                self._points[place] = self._found(layer, site)
        return self._points[place]

    def _found(self, layer: int, site: str) -> Point:
        run, n_tokens = partial(self._run_to, layer), self._probe_inputs()["input_ids"].numel()
        if site not in SITES:  # as the published call it: from the model, the model without its head, or the block
            roots = (self.model, self.model.base_model) if "{layer}" in site else (self.layers[layer],)
            return point_of_module(roots, site, layer, run, n_tokens)
        if layer not in self._anatomies:
            path = f"{self._layers_path}.{{layer}}"
            self._anatomies[layer] = Anatomy(self.layers[layer], run, 2, n_tokens, path)
        return self._anatomies[layer].point(site)

    def hook_name(self, place: Place) -> str:
        """The module of transformers whose output the place is, or whose input with .input behind it."""
        return self.point(place).hook_name(self.model)

    def width(self, place: Place) -> int:
        """W: of the residual stream activation_dim, elsewhere its own."""
        return self.point(place).width

    def _run_to(self, layer: int) -> None:
        """Run the probe through the block."""

        def stop(*_: Any) -> None:
            raise _Stop

        # hooks run in the order of their registration, so this one comes after those that look at the block
        with ExitStack() as stack, suppress(_Stop):
            stack.callback(self.layers[layer].register_forward_hook(stop).remove)
            self._forward(**self._probe_inputs())

    @contextmanager
    def _captured(self, places: Iterable[Place], stop: bool = False) -> Iterator[dict[Place, Tensor]]:
        """Collects each place's activations while the model runs; with stop, ends the run after the deepest."""
        points = {place: self.point(place) for place in in_order(places)}
        x_by_place: dict[Place, Tensor] = {}

        def keep(place: Place) -> Callable[[Tensor], None]:
            def act(x: Tensor) -> None:
                # inside a block a tensor may be added to in place
                x_by_place[place] = x if isinstance(place, int) else x.clone()
                if stop and len(x_by_place) == len(points):
                    raise _Stop

            return act

        with ExitStack() as stack:
            for place, point in points.items():
                stack.callback(attach(point, keep(place)))
            yield x_by_place

    @torch.no_grad()
    def activations(self, tokens_BL: Tensor, mask_BL: Tensor, places: Iterable[Place]) -> dict[Place, Tensor]:
        """{place: x_BLW} of all asked places, from one pass that ends at the deepest.

        On the CPU the texts are shared out to worker threads, whose operations take one thread each: small operations
        wait for threads more than they gain by them, and most where another process is busy.
        """
        places, on_cpu = list(places), self.device.type == "cpu"
        lms = self.copies(min(torch.get_num_threads(), len(tokens_BL)) if on_cpu else 1)
        n_threads = len(lms)
        n_parts = min(max(tokens_BL.numel() // PART_TOKENS, n_threads), len(tokens_BL)) if on_cpu else 1
        parts = list(zip(tokens_BL.chunk(n_parts), mask_BL.chunk(n_parts), strict=True))

        def run_share(lm: LanguageModel, first: int) -> list[dict[Place, Tensor]]:
            return [lm._activations(*part, places) for part in parts[first::n_threads]]

        shares = list((map if n_threads == 1 else workers(n_threads).map)(run_share, lms, range(n_threads)))
        x_by_part = [shares[i % n_threads][i // n_threads] for i in range(len(parts))]
        if len(parts) == 1:
            return x_by_part[0]
        return {place: torch.cat([x_by_place[place] for x_by_place in x_by_part]) for place in x_by_part[0]}

    @torch.no_grad()
    def _activations(self, tokens_BL: Tensor, mask_BL: Tensor, places: list[Place]) -> dict[Place, Tensor]:
        with self._captured(places, stop=True) as x_by_place, suppress(_Stop):
            self._forward(**self._inputs(tokens_BL, mask_BL))
        return _by_text(x_by_place, tokens_BL)

    @torch.no_grad()
    def run(
        self, tokens_BL: Tensor, mask_BL: Tensor, places: Iterable[Place] = ()
    ) -> tuple[Tensor, dict[Place, Tensor]]:
        """(logits_BLV, {place: x_BLW}) of the whole model, in one pass."""
        assert self.last_layer is None, "the model was loaded without its upper layers"
        with self._captured(places) as x_by_place:
            logits_BLV = self.model(**self._inputs(tokens_BL, mask_BL)).logits
        return logits_BLV, _by_text(x_by_place, tokens_BL)

    @torch.no_grad()
    def run_from(
        self, place: Place, x_BLW: Tensor, tokens_BL: Tensor, mask_BL: Tensor, below_BLD: Tensor | None = None
    ) -> Tensor:
        """logits_BLV of the whole model with x_BLW (cast to the dtype there) at a place.

        below_BLD: for a place inside a block, the output of the block before it, so that the lower ones need not run.
        The model's own code runs, so masks, positions, norm and unembedding are its own. Where nothing but the residual
        stream reaches the upper blocks from the lower ones, those are replaced for the call by ones that do nothing.
        """
        assert self.last_layer is None, "the model was loaded without its upper layers"
        point, layer = self.point(place), tap_of(place).layer
        inputs = self._inputs(tokens_BL, mask_BL)
        if isinstance(place, int):
            return self._spliced(layer, x_BLW, inputs, self._stand_ins_up_to(layer))
        with ExitStack() as stack:
            stack.callback(attach(point, lambda _: x_BLW.to(self.device)))
            stand_ins = self._stand_ins_up_to(layer - 1) if below_BLD is not None else []
            if below_BLD is None or not stand_ins:
                return self.model(**inputs).logits
            return self._spliced(layer - 1, below_BLD, inputs, stand_ins)

    def _stand_ins_up_to(self, layer: int) -> list[Any]:
        if layer not in self._stand_ins:
            self._stand_ins[layer] = self._tried_stand_ins(layer)
        return self._stand_ins[layer]

    def _spliced(self, layer: int, x_BLD: Tensor, inputs: dict[str, Any], stand_ins: list[Any]) -> Tensor:
        """The logits with x_BLD after block `layer`. Lower blocks run where there are no stand-ins for them."""
        x_BLD = x_BLD.to(self.device, stream_of(self._outputs[layer]).dtype)
        with ExitStack() as stack:
            if stand_ins:
                for block, output in zip(self.layers, stand_ins, strict=False):
                    stack.enter_context(_returning(block, with_stream(output, x_BLD)))
            else:
                stack.callback(attach(self.point(layer), lambda _: x_BLD))
            return self.model(**inputs).logits

    def _tried_stand_ins(self, layer: int) -> list[Any]:
        """What the blocks up to `layer` may return instead of running, or nothing: upper blocks that read more of the
        lower ones than the residual stream, such as their keys and values, need those to run.

        One trial decides, on other tokens and another length than those of the stand-ins.
        """
        stand_ins = [self._outputs.get(i) for i in range(layer + 1)]
        generator, ids = torch.Generator().manual_seed(0), self._ordinary_ids()
        tokens_BL = ids[torch.randint(len(ids), (2, 4), generator=generator)]
        inputs = self._inputs(tokens_BL, torch.ones_like(tokens_BL))
        x_BLD = torch.randn(2, 4, self.activation_dim, generator=generator)
        try:
            logits_BLV = self._spliced(layer, x_BLD, inputs, stand_ins)
        except Exception:  # whatever the model's code does without what the lower blocks leave behind
            return []
        return stand_ins if torch.equal(logits_BLV, self._spliced(layer, x_BLD, inputs, [])) else []


def _by_text(x_by_place: dict[Place, Tensor], tokens_BL: Tensor) -> dict[Place, Tensor]:
    """(B, L, W) of what some modules have as (B L, W)."""
    return {place: x if x.ndim == 3 else x.reshape(*tokens_BL.shape, -1) for place, x in x_by_place.items()}


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
