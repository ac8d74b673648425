"""The activation buffer: batches of text in, shuffled batches of activations out.

B texts or rows in a batch, L positions, D activation_dim, C capacity, U unread rows, N rows of one LLM batch.
"""

from collections.abc import Iterable
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

NORM_FACTOR_BATCHES = 100  # the norm factor is measured on as many batches as the reference does


def _norms(x: Tensor) -> Tensor:
    """fp32 norms over the last dimension, without an fp32 copy of x."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def position_mask(
    tokens_BL: Tensor,
    mask_BL: Tensor,
    x_by_layer: dict[int, Tensor],
    bos_id: int,
    norm_bound: dict[int, float] | None = None,
    drop_bos: bool = True,
) -> tuple[Tensor, dict[str, int]]:
    """The positions that SAEs are trained and scored on, the same in the norm estimate, training and metrics.

    Dropped are padding, the bos token wherever it stands (where bos is eos, the joints of packed documents too), and
    the positions whose norm in any layer is above that layer's bound or is no number.
    norm_bound: {layer: largest norm}, None to keep all norms. x_by_layer: {layer: x_BLD}.
    Returns keep_BL on the activations' device, and the counts of "tokens" (positions that are not padding),
    "padding", "bos" and "outliers"; what is kept is tokens - bos - outliers.
    """
    device = next(iter(x_by_layer.values())).device
    text_BL = mask_BL.to(device, torch.bool)
    inner_BL = text_BL & (tokens_BL.to(device) != bos_id) if drop_bos else text_BL
    keep_BL = inner_BL
    if norm_bound is not None:
        for layer, x_BLD in x_by_layer.items():
            keep_BL = keep_BL & (_norms(x_BLD) <= norm_bound[layer])
    sums = [text_BL.sum(), (~text_BL).sum(), (text_BL ^ inner_BL).sum(), (inner_BL ^ keep_BL).sum()]
    tokens, padding, bos, outliers = torch.stack(sums).tolist()
    return keep_BL, {"tokens": tokens, "padding": padding, "bos": bos, "outliers": outliers}


class ActivationBuffer:
    """An iterator over {layer: x_BD}: raw activations of the same B random positions of the text, in the LLM's dtype.

    Every position of the text that is not masked is served exactly once; the last batch may be shorter. The buffer
    is filled from the text until C positions are in it, and filled up again when fewer than half are unread.

    batches: iterator of (tokens_BL, mask_BL) with state_dict and load_state_dict.
    lm: a `model.LanguageModel` (what is used: activations, activation_dim, name, device, dtype, bos_id).
    n_tokens: C. seed: of the order in which positions are served.
    mask: False keeps every position that is not padding.
    max_norm_multiple: positions are dropped above this multiple of the median norm of their layer.
    Raises ValueError where C is smaller than a batch, and, at the first fill, where the whole text is.
    """

    _PLAIN_STATE = (
        "counts",
        "seconds",
        "llm_batch_halvings",
        "_llm_batch_size",
        "_context_length",
        "_median_norms",
        "_norm_factors",
        "_text_is_left",
        "_filling",
    )

    def __init__(
        self,
        batches: Any,
        lm: Any,
        layers: Iterable[int],
        *,
        n_tokens: int,
        out_batch_size: int,
        device: str | torch.device | None = None,
        seed: int = 0,
        mask: bool = True,
        max_norm_multiple: float = 10.0,
    ):
        if n_tokens < out_batch_size:
            raise ValueError(f"a buffer of {n_tokens} tokens is smaller than a batch of {out_batch_size}: enlarge it")
        self.batches, self.lm, self.layers = batches, lm, sorted(set(layers))
        self.n_tokens, self.out_batch_size = n_tokens, out_batch_size
        self.device = torch.device(lm.device if device is None else device)
        self.mask, self.max_norm_multiple = mask, max_norm_multiple
        self.generator = torch.Generator().manual_seed(seed)

        self.counts = {"tokens": 0, "padding": 0, "bos": 0, "outliers": 0}
        self.seconds = {"text": 0.0, "llm": 0.0}
        self.llm_batch_halvings = 0
        self._llm_batch_size = self._context_length = 0  # the largest seen
        self._median_norms: dict[int, float] = {}
        self._norm_factors: dict[int, float] = {}

        # rows order_C[cursor:] are unread, and read in this order; rows order_C[:cursor] are free
        shape = n_tokens, lm.activation_dim
        self._rows_CD = {layer: torch.empty(shape, dtype=lm.dtype, device=self.device) for layer in self.layers}
        self._order_C = torch.arange(n_tokens, device=self.device)
        self._cursor = n_tokens
        self._surplus_ND: dict[int, Tensor] | None = None  # of the last LLM batch, for the next fill
        self._text_is_left = True
        self._filling = False  # stays true where an error of the text cut a fill short: the next one completes it

    def __iter__(self) -> "ActivationBuffer":
        return self

    def __next__(self) -> dict[int, Tensor]:
        self._fill_first()
        if self._filling or (self._text_is_left and 2 * (self.n_tokens - self._cursor) < self.n_tokens):
            self._fill()
        rows_B = self._order_C[self._cursor : self._cursor + self.out_batch_size]
        if len(rows_B) == 0:
            raise StopIteration
        self._cursor += len(rows_B)
        return {layer: x_CD.index_select(0, rows_B) for layer, x_CD in self._rows_CD.items()}

    @property
    def norm_factors(self) -> dict[int, float]:
        """{layer: sqrt(mean of |x|^2)} over the first 100 batches in the first fill, or all of it; fp32."""
        self._fill_first()
        return self._norm_factors

    @property
    def median_norms(self) -> dict[int, float]:
        """{layer: median norm} over the first LLM batch without bos and padding; empty with mask=False."""
        self._fill_first()
        return self._median_norms

    @property
    def norm_bound(self) -> dict[int, float] | None:
        """What `position_mask` takes: {layer: largest norm}, None with mask=False."""
        self._fill_first()
        return self._norm_bound()

    def _norm_bound(self) -> dict[int, float] | None:
        return {layer: self.max_norm_multiple * median for layer, median in self._median_norms.items()} or None

    def _fill_first(self) -> None:
        if self._norm_factors:
            return
        self._fill()
        n_unread = self.n_tokens - self._cursor
        if n_unread < self.out_batch_size:
            raise ValueError(
                f"the text has {n_unread} positions to train on, fewer than a batch of {self.out_batch_size}: "
                "give it more text"
            )
        first = self._order_C[self._cursor :][: NORM_FACTOR_BATCHES * self.out_batch_size].split(self.out_batch_size)
        for layer, x_CD in self._rows_CD.items():
            norms = torch.cat([_norms(x_CD.index_select(0, rows_B)).cpu() for rows_B in first])
            self._norm_factors[layer] = norms.double().square().mean().sqrt().item()

    def _fill(self) -> None:
        """Write new activations into the free rows until none is left or the text ends; shuffle the unread rows."""
        self._filling = True
        while self._cursor > 0:
            x_by_layer = self._surplus_ND or self._read()
            if x_by_layer is None:
                break
            n = min(self._cursor, len(x_by_layer[self.layers[0]]))
            # backwards from the cursor, so that where a position lands does not depend on the LLM's batch size
            rows_n = self._order_C[self._cursor - n : self._cursor].flip(0)
            for layer, x_ND in x_by_layer.items():
                self._rows_CD[layer].index_copy_(0, rows_n, x_ND[:n])
            rest = {layer: x_ND[n:] for layer, x_ND in x_by_layer.items()}
            self._surplus_ND = rest if len(rest[self.layers[0]]) else None
            self._cursor -= n
        unread_U = self._order_C[self._cursor :]
        order_U = torch.randperm(len(unread_U), generator=self.generator).to(self.device)
        self._order_C[self._cursor :] = unread_U[order_U]
        self._filling = False

    def _read(self) -> dict[int, Tensor] | None:
        """{layer: x_ND} of the unmasked positions of the next batch of text, None at its end."""
        if not self._text_is_left:
            return None
        start = perf_counter()
        batch = next(self.batches, None)
        self.seconds["text"] += perf_counter() - start
        if batch is None:
            self._text_is_left = False
            return None
        tokens_BL, mask_BL = batch
        self._llm_batch_size = max(self._llm_batch_size, tokens_BL.shape[0])
        self._context_length = max(self._context_length, tokens_BL.shape[1])

        start = perf_counter()
        x_by_layer = self._activations(tokens_BL, mask_BL)
        if self.mask and not self._median_norms:
            self._median_norms = self._medians(tokens_BL, mask_BL, x_by_layer)
        keep_BL, counts = position_mask(
            tokens_BL, mask_BL, x_by_layer, self.lm.bos_id, self._norm_bound(), drop_bos=self.mask
        )
        self.counts = {name: self.counts[name] + count for name, count in counts.items()}
        kept_N = keep_BL.flatten().nonzero().squeeze(1)
        rows = {layer: x_BLD.flatten(0, 1).index_select(0, kept_N) for layer, x_BLD in x_by_layer.items()}
        rows = {layer: x_ND.to(self.device, self.lm.dtype) for layer, x_ND in rows.items()}
        self.seconds["llm"] += perf_counter() - start
        return rows

    def _medians(self, tokens_BL: Tensor, mask_BL: Tensor, x_by_layer: dict[int, Tensor]) -> dict[int, float]:
        """{layer: median norm} over the positions that are neither bos nor padding; empty where there are none."""
        keep_BL, _ = position_mask(tokens_BL, mask_BL, x_by_layer, self.lm.bos_id)
        if not keep_BL.any():
            return {}
        medians = {layer: _norms(x_BLD)[keep_BL].nanmedian().item() for layer, x_BLD in x_by_layer.items()}
        for layer, median in medians.items():
            if not 0 < median < float("inf"):
                raise ValueError(
                    f"the activations of layer {layer} of {self.lm.name} have a median norm of {median} "
                    f"in {self.lm.dtype}: try another dtype"
                )
        return medians

    def _activations(self, tokens_BL: Tensor, mask_BL: Tensor) -> dict[int, Tensor]:
        """{layer: x_BLD} of a batch of text, run in halves where the device has no memory for all of it at once."""
        while True:
            n_parts = min(2**self.llm_batch_halvings, len(tokens_BL))
            parts = zip(tokens_BL.chunk(n_parts), mask_BL.chunk(n_parts), strict=True)
            try:
                x_by_part = [self.lm.activations(tokens, mask, self.layers) for tokens, mask in parts]
                if n_parts == 1:
                    return x_by_part[0]
                return {layer: torch.cat([x[layer] for x in x_by_part]) for layer in self.layers}
            except torch.OutOfMemoryError as error:
                if n_parts == len(tokens_BL):
                    raise ValueError(
                        f"{self.lm.device} has no memory to run {self.lm.name} on one text of {tokens_BL.shape[1]} "
                        "tokens: use a smaller buffer, shorter contexts or fewer SAEs"
                    ) from error
            self.llm_batch_halvings += 1

    def config(self, layer: int) -> dict[str, Any]:
        """What the "buffer" of a layer's config.json records, as plain JSON values."""
        assert layer in self.layers
        self._fill_first()
        return {
            "d_submodule": self.lm.activation_dim,
            "io": "out",
            "n_ctxs": self.n_tokens // self._context_length,
            "ctx_len": self._context_length,
            "refresh_batch_size": self._llm_batch_size,
            "out_batch_size": self.out_batch_size,
            "device": str(self.device),
            "mask": self.mask,
            "max_norm_multiple": self.max_norm_multiple if self.mask else None,
            "median_norm": self._median_norms.get(layer),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the batches to come depend on, on the CPU; plain Python and tensors.

        Of the rows only the unread ones, in the order in which they will be served: where in memory they lie
        changes nothing that comes out.
        """
        unread = self._order_C[self._cursor :].split(self.out_batch_size)
        surplus_ND = self._surplus_ND or {}
        return {
            "unread_UD": {
                layer: torch.cat([x_CD.index_select(0, rows_B).cpu() for rows_B in unread])
                for layer, x_CD in self._rows_CD.items()
            },
            "surplus_ND": {layer: x_ND.to("cpu", copy=True) for layer, x_ND in surplus_ND.items()},
            "generator": self.generator.get_state(),
            "batches": self.batches.state_dict(),
            **deepcopy({name: getattr(self, name) for name in self._PLAIN_STATE}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the buffer that gave the state stood; both must be constructed alike."""
        assert state["unread_UD"].keys() == self._rows_CD.keys()
        self._cursor = self.n_tokens - len(state["unread_UD"][self.layers[0]])
        self._order_C = torch.arange(self.n_tokens, device=self.device)
        for layer, unread_UD in state["unread_UD"].items():
            self._rows_CD[layer][self._cursor :] = unread_UD.to(self.device)
        self._surplus_ND = {layer: x_ND.to(self.device) for layer, x_ND in state["surplus_ND"].items()} or None
        self.generator.set_state(state["generator"])
        self.batches.load_state_dict(state["batches"])
        for name in self._PLAIN_STATE:
            setattr(self, name, deepcopy(state[name]))
