"""The places of a language model that SAEs read and write: which there are, where a block has them, how to get at them.

Sites have TransformerLens's names. A block is taken apart by what its modules do on a short text, never by the model's
name: attention mixes positions, the MLP does not, and what both add to the residual stream adds up to the block's
output. Any other module is a site by its path, with {layer} for the block's number.

B texts, L positions, W width of a site, N = B L.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

RESID_POST = "resid_post"
SITES = ("resid_pre", "resid_mid", RESID_POST, "attn_out", "mlp_out", "attn_z", "mlp_in")
LEAST_FACTOR = 0.05  # residual multipliers of published models are larger, what rounding makes of 0 is smaller
TRANSCODERS = {"mlp": ("mlp_in", "mlp_out")}  # what --transcoder stands for


class Tap(NamedTuple):
    """A site of a layer's block."""

    layer: int
    site: str


Place = int | Tap  # a bare number is the output of that block, the residual stream after it


def place_at(layer: int, site: str | None = None) -> Place:
    return layer if site in (None, RESID_POST) else Tap(layer, site)


def tap_of(place: Place) -> Tap:
    """Its layer and site; also what places are sorted by."""
    return place if isinstance(place, Tap) else Tap(place, RESID_POST)


def in_order(places: Iterable[Place]) -> list[Place]:
    """Each once."""
    return sorted(set(places), key=tap_of)


def name_of(place: Place, place_out: Place | None = None) -> str:
    """As the folders of its SAEs are called: mlp_out_layer_3, of transcoders mlp_in_to_mlp_out_layer_3."""
    layer, site = tap_of(place)
    if place_out is not None and place_out != place:
        site = f"{site}_to_{tap_of(place_out).site}"
    return f"{site.replace('{layer}', str(layer))}_layer_{layer}"


def key_of(place: Place) -> int | str:
    """In files: plain numbers are block outputs, as they were before there were other places."""
    return place if isinstance(place, int) else name_of(place)


def by_key(values: Mapping[Place, Any]) -> dict[int | str, Any]:
    return {key_of(place): value for place, value in values.items()}


def by_place(values: Mapping[Any, Any], places: Iterable[Place]) -> dict[Place, Any]:
    """The other way round, of the places that there are among them."""
    return {place: values[key_of(place)] for place in places if key_of(place) in values}


def route_of(trainer: Mapping[str, Any]) -> tuple[Place, Place]:
    """The place that an SAE reads and the one that it reconstructs or predicts, as the "trainer" of its config says;
    ValueError where it says none in a layer."""
    layer, site = trainer.get("layer"), trainer.get("site") or RESID_POST
    if layer is None and site == RESID_POST:
        raise ValueError("neither its name nor its config says which layer it reads: a folder layer_{number} would.")
    if layer is None:
        raise ValueError(f"it reads {trainer.get('submodule_name') or site}, which is no place in a layer.")
    return place_at(int(layer), site), place_at(int(layer), trainer.get("site_out") or site)


def words_of(place: Place, place_out: Place | None = None) -> str:
    """In a sentence: layer 3, mlp_out of layer 3, mlp_in -> mlp_out of layer 3."""
    (layer, site), out = tap_of(place), tap_of(place if place_out is None else place_out)
    if (site, out.site) == (RESID_POST, RESID_POST):
        return f"layer {layer}"
    return f"{site if site == out.site else f'{site} -> {out.site}'} of layer {layer}"


def writes_residual(place: Place) -> bool:
    """Whether what stands there is in the coordinates of the residual stream, to which it is added or which it is."""
    return tap_of(place).site in (RESID_POST, "resid_pre", "resid_mid", "attn_out", "mlp_out")


def check_sites(sites: Iterable[str]) -> None:
    """ValueError for what is neither a site's name nor the path of a module of every layer."""
    for site in sites:
        if site in SITES or "{layer}" in site:
            continue
        if "." in site:
            raise ValueError(f"{site} is one module of one layer: write {{layer}} where its number stands.")
        raise ValueError(
            f"there is no site {site!r}: give one of {', '.join(SITES)}, or the path of a module with {{layer}} in it."
        )


# -- how to get at a tensor of a running model


def stream_of(output: Any) -> Any:
    """The tensor of a module's output, which is that or has it in front."""
    return output[0] if type(output) in (tuple, list) and len(output) else output


def with_stream(output: Any, x: Tensor) -> Any:
    """A module's output with another tensor, in the same container."""
    return type(output)((x, *output[1:])) if type(output) in (tuple, list) else x


def _first(args: tuple, kwargs: dict[str, Any]) -> int | str | None:
    """Where the activations are among the arguments of a module: the first tensor of floats that is no vector."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return key
    return None


def _argument(args: tuple, kwargs: dict[str, Any]) -> Any:
    key = _first(args, kwargs)
    return args[key] if isinstance(key, int) else None if key is None else kwargs[key]


def _with_argument(args: tuple, kwargs: dict[str, Any], x: Tensor) -> tuple[tuple, dict[str, Any]]:
    key = _first(args, kwargs)
    if isinstance(key, int):
        return (*args[:key], x, *args[key + 1 :]), kwargs
    return args, {**kwargs, str(key): x}


class Point(NamedTuple):
    """Where a site's tensor passes by: into or out of a module, as (B, L, W) or (N, W)."""

    module: nn.Module
    side: str  # "input" or "output"
    width: int  # W
    shared: bool = False  # what reads it besides the module reads the same memory, so it is overwritten there
    origin: nn.Module | None = None  # of what goes into a module, the one whose output it is

    def hook_name(self, model: nn.Module) -> str:
        """A module's path for its output, with .input behind it for its input; an output where it is both."""
        module = self.module if self.side == "output" else self.origin
        paths = {module: path for path, module in model.named_modules()}
        return paths[module] if module in paths else f"{paths[self.module]}.input"


def attach(point: Point, act: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
    """Call `act` with the tensor whenever it passes; what it returns, if anything, goes on in its place, in its shape
    and dtype.  Returns what ends that."""

    def other(x: Tensor) -> Tensor | None:
        new = act(x)
        # a copy, since what comes next in the model may add to it in place
        return None if new is None else new.reshape(x.shape).to(x.dtype, copy=True)

    def of_output(_module, _args, output: Any) -> Any:
        new = other(stream_of(output))
        return None if new is None else with_stream(output, new)

    def of_input(_module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x = _argument(args, kwargs)
        new = other(x)
        if new is None:
            return None
        if point.shared:
            x.copy_(new)
            return None
        return _with_argument(args, kwargs, new)

    if point.side == "output":
        return point.module.register_forward_hook(of_output).remove
    return point.module.register_forward_pre_hook(of_input, with_kwargs=True).remove


# -- where a block has its sites


class _Call(NamedTuple):
    """What a module did in one run."""

    path: str  # inside what was looked at
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    given: Tensor  # the tensor among them, and a copy of its values then
    made: Tensor  # what came out, and a copy
    given_NW: Tensor
    made_NW: Tensor
    began: int  # its place among all beginnings


def _values(x: Tensor) -> Tensor:
    """(N, W) in float64, of what is now in x."""
    return x.detach().double().reshape(-1, x.shape[-1]).clone()


@contextmanager
def _recorded(root: nn.Module, n_tokens: int) -> Iterator[list[_Call]]:
    """Within this, what the modules in `root` do to N tokens, itself included, in the order in which they end."""
    calls: list[_Call] = []
    begun: dict[nn.Module, list[tuple]] = {}
    n_begun = 0

    def is_of_tokens(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and x.numel() == n_tokens * x.shape[-1]

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal n_begun
        x = _argument(args, kwargs)
        begun.setdefault(module, []).append((args, kwargs, x, _values(x) if is_of_tokens(x) else None, n_begun))
        n_begun += 1

    def leave(path: str) -> Callable:
        def keep(module: nn.Module, _args, output: Any) -> None:
            args, kwargs, x, values_NW, began = begun[module].pop()
            made = stream_of(output)
            if values_NW is not None and is_of_tokens(made):
                calls.append(_Call(path, module, args, kwargs, x, made, values_NW, _values(made), began))

        return keep

    with ExitStack() as stack:
        for path, module in root.named_modules():
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave(path)).remove)
        yield calls


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _mixes(call: _Call, n_texts: int) -> bool:
    """Whether what a module makes of the last position depends on what it is given at the first."""

    def last(x: Tensor) -> Tensor:
        args, kwargs = _with_argument(call.args, call.kwargs, x)
        made = stream_of(call.module(*args, **kwargs))
        return made.reshape(n_texts, -1, made.shape[-1])[:, -1].double()

    x = call.given_NW.to(call.given).reshape(call.given.shape)
    other = x.clone()
    by_text = other.view(n_texts, -1, x.shape[-1])
    by_text[:, 0] = by_text[:, 0].flip(-1) + by_text.std()
    before, after = last(x), last(other)
    # what other tokens are with it in a batch may change how a product is rounded, as that of an expert
    least = max(1e-5, torch.finfo(call.made.dtype).eps)
    return bool((before - after).norm() > least * before.norm())


def _fits(y_NW: Tensor, parts_NW: list[Tensor], eps: float) -> bool:
    """Whether y is a sum of the parts, each times a number that is not 0: residual multipliers are such numbers, and
    a part that has another in it leaves nothing for that one.

    Every entry counts by its size beside what it is made of, as rounding does: a few entries of a residual stream may
    be so large that all else is nothing beside them.
    """
    if any(part_NW.shape != y_NW.shape for part_NW in parts_NW):
        return False
    A, y = torch.stack([part_NW.flatten() for part_NW in parts_NW], 1).cpu(), y_NW.flatten().cpu()[:, None]
    sizes = (A.abs().sum(1, keepdim=True) + y.abs()).clamp_min(torch.finfo(A.dtype).tiny)
    A, y, tolerance = A / sizes, y / sizes, max(1e-4, 2 * eps)
    factors = torch.linalg.lstsq(A, y).solution
    rounded = tolerance * (A.abs() @ factors.abs()).norm()
    return bool((y - A @ factors).norm() <= rounded and factors.abs().min() > LEAST_FACTOR)


def _is_attention(call: _Call, path: str) -> bool:
    return bool(re.search("attn|attention", path + type(call.module).__name__, re.I))


def _listed(calls: list[_Call]) -> str:
    return ", ".join(dict.fromkeys(call.path for call in calls))


class Anatomy:
    """A block taken apart, by one run of the model over a short text.

    run: runs the model on that text up to the block; its texts have the same length.
    path: of the block in the model, with {layer}, for advice.
    """

    def __init__(self, block: nn.Module, run: Callable[[], None], n_texts: int, n_tokens: int, path: str):
        self.block, self.run, self.n_texts, self.n_tokens = block, run, n_texts, n_tokens
        self.path = path
        with _recorded(block, n_tokens) as calls:
            run()
        if not calls or calls[-1].path:
            raise ValueError("it takes no activations of the tokens")
        self.calls, self.whole = calls[:-1], calls[-1]
        if not self.whole.made_NW.isfinite().all():
            dtype = str(self.whole.made.dtype).removeprefix("torch.")
            raise ValueError(f"what it computes in {dtype} is not finite, so that its parts cannot be told")
        self.eps = torch.finfo(self.whole.made.dtype).eps
        paths = {call.path for call in self.calls if not self._holds_more_than_attention(call)}
        # the outermost modules, whatever containers they stand in
        tops = [call for call in self.calls if call.path in paths]
        self.parts = [call for call in tops if not any(call.path.startswith(f"{path}.") for path in paths)]
        wide = [call for call in self.parts if _has_matrix(call.module)]
        # some attention reads the keys and values of a lower block, so that it mixes nothing of what it is given
        self.attentions = [call for call in wide if _is_attention(call, call.path)]
        self.mixers = [call for call in wide if call in self.attentions or _mixes(call, n_texts)]
        self.mlps = [call for call in wide if call not in self.mixers]

    def point(self, site: str) -> Point:
        """ValueError, in one sentence, where the block has no such site."""
        return getattr(self, f"_{site}")()

    def _advice(self, calls: list[_Call]) -> str:
        paths = [f"{self.path}.{call.path}" for call in calls][:2]
        return f"; name a module by its path instead, such as {' or '.join(paths)}" if paths else ""

    def _attention(self) -> _Call:
        if len(self.attentions) == 1:
            return self.attentions[0]
        what = f"several attention modules ({_listed(self.attentions)})" if self.attentions else "no attention"
        instead = f", but {_listed(self.mixers)}" if self.mixers and not self.attentions else ""
        raise ValueError(f"it has {what}{instead}{self._advice(self.mixers)}")

    def _mlp(self) -> list[_Call]:
        if not self.mlps:
            raise ValueError(f"it has no MLP{self._advice(self.mixers)}")
        return self.mlps

    def _after(self, call: _Call) -> _Call:
        """The last of the modules without matrices that take one another's output as it is and change it: norms."""
        made = call.made
        for later in self.parts:
            once = sum(other.module is later.module for other in self.calls) == 1
            if later.began > call.began and later.given is made and once and not _has_matrix(later.module):
                made = later.made
                if not torch.equal(later.made_NW, call.made_NW):  # as a dropout would not
                    call = later
        return call

    def _inside(self, call: _Call) -> list[_Call]:
        return [c for c in self.calls if c.path.startswith(f"{call.path}.") and _has_matrix(c.module)]

    def _holds_more_than_attention(self, call: _Call) -> bool:
        """Whether a module runs one of attention and then more than one matrix, as an output projection would be."""
        inside, leaves = self._inside(call), self._leaves(call)
        for inner in inside:
            if _is_attention(inner, inner.path.removeprefix(f"{call.path}.")) and len(self._leaves(inner)) > 1:
                later = [leaf for leaf in leaves if leaf.began > inner.began]
                if len([leaf for leaf in later if not leaf.path.startswith(f"{inner.path}.")]) > 1:
                    return True
        return False

    def _leaves(self, call: _Call) -> list[_Call]:
        """The matrices in a module, in the order in which they were used."""
        inside = self._inside(call)
        return [c for c in inside if not any(other.path.startswith(f"{c.path}.") for other in inside)] or [call]

    def _others(self) -> list[_Call]:
        """What mixes positions beside attention and is added to the residual stream with it."""
        return [self._after(call) for call in self.mixers if call not in self.attentions]

    def _added(self) -> tuple[_Call | None, _Call | None, _Call | None]:
        """What attention and MLP add to the residual stream: the modules out of which it comes.

        That is their own output, behind a norm where it passes one, or that of their last matrix where they add the
        residual stream themselves.  Behind the MLP some blocks add one more part, of the embedding.
        """

        def ends(calls: list[_Call]) -> list[_Call | None]:
            return [end for call in calls for end in (self._after(call), self._leaves(call)[-1])] or [None]

        others = self._others()
        last, first = self.mlps[-1:], self.mlps[:1]
        beside = [call for call in last if torch.equal(call.given_NW, first[0].given_NW)]  # it is one of several MLPs
        ways = product(ends(self.attentions[:1]), [(mlp, None) for mlp in ends(last)])
        more = product(ends(self.attentions[:1]), product(ends(first), ends([c for c in last if c not in beside])))
        for attention, (mlp, extra) in chain(ways, more):
            parts = [call.made_NW for call in (attention, mlp, extra, *others) if call is not None]
            if parts and _fits(self.whole.made_NW, [self.whole.given_NW, *parts], self.eps):
                return attention, mlp, extra
        raise ValueError(
            "it returns no sum of what it is given, its attention and its MLP"
            + self._advice([*self.mixers, *self.mlps])
        )

    def _resid_pre(self) -> Point:
        return Point(self.block, "input", self.whole.given.shape[-1])

    def _resid_post(self) -> Point:
        return Point(self.block, "output", self.whole.made.shape[-1])

    def _attn_out(self) -> Point:
        self._attention()
        call = self._added()[0]
        assert call is not None
        return Point(call.module, "output", call.made.shape[-1])

    def _mlp_out(self) -> Point:
        self._mlp()
        call = self._added()[1]
        assert call is not None
        return Point(call.module, "output", call.made.shape[-1])

    def _mlp_in(self) -> Point:
        first, *rest = self._mlp()
        if rest:  # one after the other, or else this would be one of several
            self._added()
        origins = [call.module for call in self.parts if call.made is first.given]
        return Point(first.module, "input", first.given.shape[-1], origin=next(iter(origins), None))

    def _attn_z(self) -> Point:
        call = self._leaves(self._attention())[-1]
        return Point(call.module, "input", call.given.shape[-1])

    def _resid_mid(self) -> Point:
        attention, (added, mlp, extra) = self._attention(), self._added()
        assert added is not None
        mixed_NW = [call.made_NW for call in (added, *self._others())]
        if mlp is not None:
            for call in self.parts:
                behind = call.began > attention.began and call.given is not added.made and call.given is not call.made
                if behind and _fits(call.given_NW, [self.whole.given_NW, *mixed_NW], self.eps):
                    point = Point(call.module, "input", call.given.shape[-1], shared=True)
                    if self._is_the_stream(point, [call.path for call in (mlp, extra) if call is not None]):
                        return point
                    break
        raise ValueError("it has no resid_mid: its attention and its MLP do not follow one another")

    def _is_the_stream(self, point: Point, paths: list[str]) -> bool:
        """Whether what is written there is all that the rest of the block reads, which adds the outputs of `paths`."""
        generator = torch.Generator().manual_seed(0)
        x_NW = torch.randn(self.n_tokens, point.width, generator=generator).to(self.whole.made.device)
        with _recorded(self.block, self.n_tokens) as calls:
            remove = attach(point, lambda x: x_NW)
            try:
                self.run()
            finally:
                remove()
        made = [call.made_NW for call in calls if call.path in paths]
        return _fits(calls[-1].made_NW, [x_NW.double(), *made], self.eps)


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path) if path else None
    except AttributeError:
        return None


def point_of_module(roots: Iterable[nn.Module], path: str, layer: int, run: Callable[[], None], n_tokens: int) -> Point:
    """The output of the module of a path or, with `.input` behind it, its input; ValueError where there is none.

    roots: where the path may begin, in the order in which they are asked.
    """
    path = path.replace("{layer}", str(layer))
    before, _, last = path.rpartition(".")
    ways = [(path, "output")] + ([(before, last)] if last in ("input", "output") else [])
    found = [(m, p, side) for root in roots for p, side in ways if (m := _submodule(root, p)) is not None]
    if not found:
        raise ValueError(f"it has no module {path}")
    module, path, side = found[0]
    seen: list[Any] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(_argument(args, kwargs)) if side == "input" else None, with_kwargs=True
        ),
        module.register_forward_hook(
            lambda _m, _a, output: seen.append(stream_of(output)) if side == "output" else None
        ),
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 1:
        raise ValueError(f"text runs its {path} {len(seen)} times, so that it is no site")
    x = seen[0]
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and x.numel() == n_tokens * x.shape[-1]):
        shape = f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"the {side} of its {path} is no tensor (texts, positions, width) but {shape}")
    return Point(module, side, x.shape[-1])
