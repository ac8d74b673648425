"""Seconds to evaluate the SAEs of one layer on held-out text, ours beside the reference's way.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --saes 16 --architectures batch_top_k --contexts 128 --nnsight PYTHON

Built-in model and text.  The SAEs are untrained, with biases or thresholds that make about --l0 latents active; they
lie in files which each side loads with its own loader, before the clock starts.  The reference is dictionary-learning
0.1.0 and does what its demo does: for each SAE by itself a new ActivationBuffer, and for each batch its `evaluate`: a
batch of activations from the buffer, and loss recovered by whole-model passes (original, activations, reconstructed,
zero).

    reference           reads and edits the model by plain hooks, in the passes of its loss_recovered
    reference, nnsight  the package as it is, with --nnsight: the Python of an environment that has nnsight 0.3
    floor               one whole-model pass; then for each SAE its matmuls, the layers above and the cross entropy

Both sides get the same contexts as text, in batches of the same size, and score every position.  Ours reports more: KL,
mean ablation, standard errors, and the top-k family both by its threshold and by exact top-k.
Contestants work in processes of their own, in turn.  The table: median seconds, the spread (interquartile range over
median), the ratio to `ours` in the same round (median of ratios), and the largest relative difference from our losses.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contest
import torch
from torch.nn.functional import cross_entropy

LOSSES = ("loss_original", "loss_zero", "loss_reconstructed")
Losses = dict[str, list[float]]  # by SAE folder


# -- what is evaluated


@torch.no_grad()
def set_l0(sae: Any, x_ND: torch.Tensor, l0: float) -> None:
    """Make about `l0` latents of a token active."""
    pre_N = (x_ND @ sae.encoder_FD.T).flatten()
    bound = pre_N.kthvalue(round(len(pre_N) * (1 - l0 / sae.dict_size))).values
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(bound)
    else:
        for bias in (sae.gate_bias, sae.mag_bias) if hasattr(sae, "gate_bias") else (sae.encoder.bias,):
            bias.fill_(-bound)


def write_work(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The SAEs and the text, in files; what a contestant needs to know of them."""
    sys.path.append(str(contest.ROOT))
    import demo
    from dictionary_learning.formats import save_sae
    from dictionary_learning.model import BUILT_IN, load_model
    from dictionary_learning.world import World

    # one SAE of each architecture for every seed
    grid = (
        f"--target_l0s {args.l0} --standard_penalties 1 --p_anneal_penalties 1 --gated_penalties 1 --device cpu".split()
    )
    grid += ["--architectures", *args.architectures, "--random_seeds", *map(str, range(1, args.saes + 1))]
    plan = demo.make_plan(demo.build_parser().parse_args([*grid, *args.demo_flags]), World())
    lm, layer = load_model(plan.model_name), plan.layers[0]
    texts, tokens = [], []
    batches = plan.open_text(lm.tokenizer, evaluation=True)
    for context in itertools.chain.from_iterable(tokens_BL.tolist() for tokens_BL, _ in batches):
        text = lm.tokenizer.decode(context)
        # the reference leaves out the targets that are eos
        if lm.tokenizer(text)["input_ids"] == context and context.count(lm.bos_id) == 1 and len(texts) < args.contexts:
            texts.append(text)
            tokens.append(context)
    tokens_BL = torch.tensor(tokens[:16])
    x_ND = lm.activations(tokens_BL, torch.ones_like(tokens_BL), [layer])[layer].flatten(0, 1)
    folders = []
    for config in [config for i in range(args.saes) for config in plan.configs[i :: args.saes]][: args.saes]:
        trainer = config["trainer"](**{name: value for name, value in config.items() if name != "trainer"})
        if hasattr(trainer.ae, "normalize_decoder"):
            trainer.ae.normalize_decoder()
        set_l0(trainer.ae, x_ND, args.l0)
        folders.append(str(folder / f"trainer_{len(folders)}"))
        save_sae(folders[-1], trainer.ae, {"trainer": trainer.config, "buffer": {"ctx_len": plan.sweep.context_length}})
    length, size = plan.sweep.context_length, plan.sweep.eval_batch_size or max(plan.sweep.llm_batch_size // 4, 1)
    return {
        "model": str(BUILT_IN[plan.model_name]),
        "layer": layer,
        "device": args.device,
        "texts": texts,
        "folders": folders,
        "batch_size": size,
        "buffer": {
            "d_submodule": plan.activation_dim,
            "n_ctxs": len(texts),
            "ctx_len": length,
            "refresh_batch_size": plan.sweep.llm_batch_size,
            "out_batch_size": size * length,
            "device": args.device,
        },
        "evaluate": dict(max_len=length, batch_size=size, n_batches=len(texts) // size, device=args.device),
    }


# -- the contestants: each makes a function that evaluates all SAEs


def load_ours(work: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from dictionary_learning.formats import load_dictionary
    from dictionary_learning.model import load_model

    lm = load_model(work["model"], device=work["device"])
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    return lm, {folder: load_dictionary(folder, work["device"])[0] for folder in work["folders"]}


def batches_of(work: dict[str, Any], tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    texts, size = work["texts"], work["batch_size"]
    encoded = [tokenizer(texts[i : i + size], return_tensors="pt", padding=True) for i in range(0, len(texts), size)]
    return [(batch["input_ids"], batch["attention_mask"]) for batch in encoded]


def ours(work: dict[str, Any]) -> Callable[[], Losses]:
    from dictionary_learning.buffer import Mask
    from dictionary_learning.dictionary import AutoEncoderTopK
    from dictionary_learning.evaluation import evaluate_saes

    lm, saes = load_ours(work)

    def run() -> Losses:
        subjects = [(folder, sae, work["layer"]) for folder, sae in saes.items()]
        masks = dict.fromkeys(saes, Mask(drop_bos=False))
        evaluations = evaluate_saes(lm, subjects, batches_of(work, lm.tokenizer), masks=masks)
        losses = {}
        for folder, (results, _) in evaluations.items():
            # the reference's TopK SAE does not use its threshold
            exact = "topk_" if isinstance(saes[folder], AutoEncoderTopK) else ""
            losses[folder] = [results[name] for name in LOSSES[:2]] + [results[f"{exact}loss_reconstructed"]]
        return losses

    return run


@torch.no_grad()
def loss_recovered(texts: list[str], model: contest.HookedModel, submodule, dictionary, max_len, **_) -> tuple:
    """The passes of the reference's function of this name, without nnsight: (original, reconstructed, zero)."""
    options = {"use_cache": False, "output_attentions": False}
    model.run(["_"], max_len)  # it asks for the type of the block's output
    inputs, original = model.run(texts, max_len)
    model.run(texts, max_len, **options)
    x_BLD = model.output.value
    edits = [dictionary(x_BLD).to(model.dtype), torch.zeros_like(x_BLD)]
    logits = [original] + [model.run(texts, max_len, edit, **options)[1] for edit in edits]
    targets, ignore = inputs["input_ids"][:, 1:].flatten(), model.tokenizer.pad_token_id
    return tuple(cross_entropy(logits_BLV[:, :-1].flatten(0, 1), targets, ignore_index=ignore) for logits_BLV in logits)


def reference(work: dict[str, Any]) -> Callable[[], Losses]:
    model, submodule, _ = contest.reference_model(work["model"], work["layer"], work["device"])
    from dictionary_learning import evaluation
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.utils import load_dictionary

    if isinstance(model, contest.HookedModel):
        evaluation.loss_recovered = loss_recovered
    saes = {folder: load_dictionary(folder, work["device"])[0] for folder in work["folders"]}

    class Buffer(ActivationBuffer):
        """Losses have a stream of the texts of their own, so that they are of the texts that ours are of."""

        def text_batch(self, batch_size: int | None = None) -> list[str]:
            return super().text_batch() if batch_size is None else list(itertools.islice(self.loss_texts, batch_size))

    def run() -> Losses:
        losses = {}
        for folder, sae in saes.items():
            buffer: Any = Buffer(itertools.cycle(work["texts"]), model, submodule, **work["buffer"])
            buffer.loss_texts = iter(work["texts"])
            results = evaluation.evaluate(sae, buffer, **work["evaluate"])
            losses[folder] = [results[name] for name in LOSSES]
        return losses

    return run


def floor(work: dict[str, Any]) -> Callable[[], Losses]:
    lm, saes = load_ours(work)

    @torch.no_grad()
    def run() -> Losses:
        for tokens_BL, mask_BL in batches_of(work, lm.tokenizer):
            _, x_by_layer = lm.run(tokens_BL, mask_BL, [work["layer"]])
            x_BLD = x_by_layer[work["layer"]]
            for sae in saes.values():
                x_hat_BLD = torch.relu(x_BLD @ sae.encoder_FD.T) @ sae.decoder_FD
                logits_BLV = lm.run_from(work["layer"], x_hat_BLD, tokens_BL, mask_BL)
                cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].to(lm.device).flatten())
        return {}

    return run


def main() -> None:
    from step import ARCHITECTURES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=int, default=16)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), help="of the SAEs, in turn")
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--contexts", type=int, default=32)
    args, args.demo_flags = contest.parse(parser)
    if not args.contestant:
        compete(args)
        return
    run = {"ours": ours, "reference": reference, "floor": floor}[args.contestant](json.loads(args.work.read_text()))
    run()
    contest.answer(ready=True)
    for _ in contest.questions():
        contest.synchronize(args.device)
        start = time.perf_counter()
        losses = run()
        contest.synchronize(args.device)
        contest.answer(seconds=time.perf_counter() - start, losses=losses)


def compete(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "work").write_text(json.dumps(write_work(args, Path(folder))))
        contestants = contest.enter(__file__, f"{folder}/work", args.reference, args.nnsight)
        contest.rounds(contestants, args.rounds)
        for contestant in contestants:
            contestant.stop()
    print(f"{contest.machine(args.device)}, {args.rounds} rounds of {args.saes} SAEs on {args.contexts} contexts")
    print(f"SAEs: {', '.join(args.architectures)}")
    print("| contestant | seconds | spread | ratio to ours | difference of losses |")
    print("|---|---|---|---|---|")
    mine = contestants[0].answers[0]["losses"]
    for contestant in contestants:
        seconds, spread = contest.median_and_spread([a["seconds"] for a in contestant.answers])
        ratio = contest.median_ratio(contestant, contestants[0])
        losses = contestant.answers[0]["losses"]
        pairs = [pair for f in losses for pair in zip(losses[f], mine[f], strict=True)]
        difference = f"{max(abs(theirs / own - 1) for theirs, own in pairs):.0e}" if pairs else ""
        print(f"| {contestant.name} | {seconds:.2f} | {spread:.0%} | {ratio:.2f} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
