"""Seconds and memory of one training step, ours beside the peers', in one interleaved run.

    python benchmarks/step.py
    python benchmarks/step.py --shapes 512,16384,2048,64 --architectures top_k batch_top_k \\
        --peer reference=third_party/dictionary-learning-0.1.0 --peer saelens=PYTHON --peer sparsify=PYTHON

Every contestant runs in a process of its own, one after the other takes its turn, so that whatever slows the machine
slows all.  In a turn the first step finds the caches cold and does not count; then come as many as take about two
seconds, as in a training loop.
`--peer NAME=WHERE`: a folder with the package, or the Python of an environment that has it (for reference, saelens,
sparsify).  `matmul` is the bare encoder matmul x E^T of the same shape and dtype.

The table: median seconds a step, the spread (interquartile range over median), the ratio to `ours` in the same round
(median of ratios; above 1 means slower than ours), and what the step adds to the peak memory of the process.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

import contest
import torch

LR, STEPS = 3e-4, 100_000
TURN_SECONDS = 2.0
DENSITY = 0.02  # of the ReLU family, whose L0 is no setting
TOP_K = ("top_k", "batch_top_k", "matryoshka_batch_top_k")
ARCHITECTURES = ("top_k", "batch_top_k", "matryoshka_batch_top_k", "standard", "gated", "jump_relu")
GROUPS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]


def dictionary_learning_trainer(architecture: str, D: int, F: int, k: int, device: str):
    """A trainer of whichever dictionary_learning is on the path, ours or the reference."""
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    common = dict(
        steps=STEPS, activation_dim=D, dict_size=F, layer=0, lm_name="m", lr=LR, warmup_steps=1, decay_start=None,
        seed=0, device=device, wandb_name="w", submodule_name="s",
    )  # fmt: skip
    penalty = dict(l1_penalty=0.04, sparsity_warmup_steps=0)
    made = {
        "top_k": lambda: top_k.TopKTrainer(**common, k=k),
        "batch_top_k": lambda: batch_top_k.BatchTopKTrainer(**common, k=k),
        "matryoshka_batch_top_k": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
            **common, k=k, group_fractions=GROUPS
        ),
        "standard": lambda: standard.StandardTrainer(**common, **penalty),
        "gated": lambda: gdm.GatedSAETrainer(**common, **penalty),
        "jump_relu": lambda: jumprelu.JumpReluTrainer(**common, sparsity_warmup_steps=0, target_l0=k),
    }
    return made[architecture]()


@torch.no_grad()
def set_density(trainer, x_BD: torch.Tensor) -> None:
    """Shift the encoder's bias so that the wanted share of features is active, and note that it is."""
    ae = trainer.ae
    weight_FD = ae.encoder.weight if hasattr(ae, "encoder") else ae.W_enc.T
    weight_FD.div_(weight_FD.norm(dim=1, keepdim=True))
    bias = ae.gate_bias if hasattr(ae, "gate_bias") else ae.encoder.bias if hasattr(ae, "encoder") else ae.b_enc
    bias.zero_()
    bias.fill_(-float((x_BD @ weight_FD.T).flatten()[::97].quantile(1 - DENSITY)))
    if hasattr(ae, "mag_bias"):
        ae.mag_bias.copy_(bias)
    if hasattr(trainer, "sparse"):
        trainer.sparse = True


def step_of(contestant: str, architecture: str, D: int, F: int, k: int, x_BD: torch.Tensor):
    """A function that takes one training step."""
    device = str(x_BD.device)
    if contestant == "matmul":
        weight_FD = torch.randn(F, D, device=device)
        out_BF = torch.empty(len(x_BD), F, device=device)
        return lambda step: torch.mm(x_BD, weight_FD.T, out=out_BF)
    if contestant in ("ours", "reference"):
        trainer = dictionary_learning_trainer(architecture, D, F, k, device)
        if architecture not in TOP_K:
            set_density(trainer, x_BD)
        return lambda step: trainer.update(step, x_BD)
    if contestant == "saelens":
        return saelens_step(architecture, D, F, k, x_BD)
    if contestant == "sparsify":
        return sparsify_step(D, F, k, x_BD)
    raise ValueError(f"unknown contestant {contestant}")


def saelens_step(architecture: str, D: int, F: int, k: int, x_BD: torch.Tensor):
    """What SAELens's trainer does in a step: loss, backward, clip, Adam, firing statistics."""
    import sae_lens.saes as saes
    from sae_lens.saes.sae import TrainStepInput

    common = dict(d_in=D, d_sae=F, device=str(x_BD.device), dtype="float32")
    configs = {
        "top_k": ("TopKTrainingSAE", "TopKTrainingSAEConfig", dict(k=k)),
        "batch_top_k": ("BatchTopKTrainingSAE", "BatchTopKTrainingSAEConfig", dict(k=k)),
        "standard": ("StandardTrainingSAE", "StandardTrainingSAEConfig", dict(l1_coefficient=0.04)),
        "gated": ("GatedTrainingSAE", "GatedTrainingSAEConfig", dict(l1_coefficient=0.04)),
        "jump_relu": ("JumpReLUTrainingSAE", "JumpReLUTrainingSAEConfig", dict(l0_coefficient=0.01)),
    }
    sae_class, config_class, extra = configs[architecture]
    sae = getattr(saes, sae_class)(getattr(saes, config_class)(**common, **extra))
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    silent_F, fired_F = torch.zeros(F, device=x_BD.device), torch.zeros(F, device=x_BD.device)
    names = ("l1", "l0", "aux")
    coefficients = {name: 0.04 for name in names}

    def step(i: int) -> None:
        out = sae.training_forward_pass(
            step_input=TrainStepInput(
                sae_in=x_BD, dead_neuron_mask=silent_F > 1000, coefficients=coefficients, n_training_steps=i,
                is_logging_step=False,
            )
        )  # fmt: skip
        with torch.no_grad():
            fires_BF = out.feature_acts.bool().float()
            silent_F.add_(1)
            silent_F[fires_BF.sum(-2).bool()] = 0
            fired_F.add_(fires_BF.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sparsify_step(D: int, F: int, k: int, x_BD: torch.Tensor):
    """What sparsify's trainer does in a step, with Adam."""
    sparsify, device = contest.import_sparsify(x_BD.device.type), str(x_BD.device)
    config = sparsify.SparseCoderConfig(num_latents=F, k=k)
    sae = sparsify.SparseCoder(D, config, device=device, dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(i: int) -> None:
        if sae.cfg.normalize_decoder:
            sae.set_decoder_norm_to_unit_norm()
        out = sae(x_BD)
        out.fvu.backward()
        if sae.cfg.normalize_decoder:
            sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# -- a contestant's process


def peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def now_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compete(contestant: str, architecture: str, D: int, F: int, B: int, k: int, device: str) -> None:
    """Take a turn for each line of standard input, and answer with the seconds of a step."""
    if contestant == "reference":
        sys.meta_path.insert(0, contest.StubImports())
    torch.manual_seed(0)
    directions = torch.randn(4 * D, D, device=device) / D**0.5
    x_BD = (torch.rand(B, 4 * D, device=device) < 0.02).float() @ directions
    x_BD = x_BD / x_BD.norm(dim=1).square().mean().sqrt()
    step = step_of(contestant, architecture, D, F, k, x_BD)
    before = now_bytes(device)
    for i in range(2):
        step(i)
    contest.answer(peak=peak_bytes(device) - before)
    steps = itertools.count(2)

    def seconds_of(n: int) -> float:
        contest.synchronize(device)
        start = time.perf_counter()
        for i in itertools.islice(steps, n):
            step(i)
        contest.synchronize(device)
        return time.perf_counter() - start

    for _ in contest.questions():
        n = max(1, round(TURN_SECONDS / seconds_of(1)))
        contest.answer(seconds=seconds_of(n) / n)


def enter(name: str, where: str | None, arguments: list[str]) -> contest.Contestant:
    path, python = contest.place(where)
    command = [__file__, "--contestant", name, *arguments]
    return contest.Contestant(name, command, contest.ROOT if name == "ours" else path, python)


def compare(
    architecture: str, shape: tuple[int, int, int, int], peers: dict[str, str], rounds: int, device: str
) -> None:
    D, F, B, k = shape
    arguments = ["--architectures", architecture, "--shapes", f"{D},{F},{B},{k}", "--device", device]
    names = {"ours": None, **peers, "matmul": None}
    if architecture != "top_k":
        names.pop("sparsify", None)
    if architecture == "matryoshka_batch_top_k":
        names.pop("saelens", None)
    contestants = [enter(name, where, arguments) for name, where in names.items()]
    contest.rounds(contestants, rounds)
    for c in contestants:
        seconds, spread = contest.median_and_spread([answer["seconds"] for answer in c.answers])
        ratio = contest.median_ratio(c, contestants[0])
        cells = (f"{D},{F},{B},{k}", architecture, c.name, f"{seconds:.4f}", f"{spread:.0%}")
        print(f"| {' | '.join(cells)} | {ratio:.2f} | {c.ready['peak'] / 2**20:.0f} |", flush=True)
        c.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512,16384,2048,64"], help="D,F,B,k")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--peer", action="append", default=[], help="NAME=WHERE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    if args.contestant:
        D, F, B, k = shapes[0]
        compete(args.contestant, args.architectures[0], D, F, B, k, args.device)
        return
    peers = dict(peer.split("=", 1) for peer in args.peer)
    print(f"{contest.machine(args.device)}, fp32, {args.rounds} rounds")
    print("| D,F,B,k | architecture | contestant | s/step | spread | ratio to ours | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for shape in shapes:
        for architecture in args.architectures:
            compare(architecture, shape, peers, args.rounds, args.device)


if __name__ == "__main__":
    main()
