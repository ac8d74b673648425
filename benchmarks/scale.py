"""What several processes cost: bytes and seconds measured on this machine, and a model of many GPUs.

    python benchmarks/scale.py
    python benchmarks/scale.py --parts model --buffer_tokens 2_000_000 --step_ms S1=0.9 S2=3.1

Measured: demo.py trains on the built-in model under torchrun, single-threaded, over gloo, with 1, 2 and 4 processes:
once four SAEs of two layers, once one SAE with its latents split.  Bytes are counted where they are handed to
torch.distributed, and compared with the formulas that the model uses.

Modelled: tokens/s of 1, 8 and 64 GPUs, from these formulas and the constants below.  Nothing of it is timed, unless
--step_ms gives the milliseconds of a training step that `benchmarks/step.py` has measured on one GPU.

B tokens a step, D activation_dim, F dict_size, W processes, R of them read a layer, C buffer_tokens.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# -- of the measurement
WIDTH, BATCH, K, DIM = 1024, 512, 16, 192  # DIM: the built-in model's
FIRST, LAST = 12, 100  # the steps [FIRST, LAST) are measured: after the first threshold, before the density's check
ARCHITECTURES = ("top_k", "batch_top_k", "standard")
# Twenty times as many tokens as are trained on: schedules and the age of dead latents are then those of a long run.
FLAGS = f"""--device cpu --no_eval --dictionary_widths {WIDTH} --sae_batch_size {BATCH} --buffer_tokens {20 * BATCH}
    --llm_batch_size 8 --num_tokens {20 * LAST * BATCH} --threshold_start_step 5 --log_steps 1000
    --standard_penalties 0.1""".split()

# -- of the model
LLM_FLOPS = 400e12  # of an H100 on the LLM, about half of its bf16 peak: an assumption
NODE_GPUS, NODE_BANDWIDTH = 8, 400e9  # bytes/s of a GPU to others of its node: NVLink of an H100 node, in a ring
NET_BANDWIDTH = 50e9  # bytes/s of a GPU to other nodes: one 400 Gb/s adapter for each
LATENCY = 20e-6  # s of a collective, however small: an assumption
ELEMENT = 2  # bytes of an activation and, under autocast, of a pre-activation: bf16
N_SAES, GPUS, SPLIT = 24, (1, 8, 64), 8


@dataclass(frozen=True)
class Shape:
    """An SAE and the model it reads, through a middle layer.

    step_ms: of an H100 in bf16, a roofline of top-k with k = 64 (800 TFLOP/s, 3.0 TB/s, no launch costs). "ideal": one
    encoder GEMM, sparse products, Adam in two passes over weights, moments and gradients (17 x 4DF bytes); "dense": six
    GEMMs, and projection, clip, fused Adam and renorm as torch has them (26 x 4DF bytes).
    """

    model: str
    parameters: float  # from the embedding (without it) through the layer; a token costs 2 FLOPs for each
    D: int
    F: int
    B: int
    step_ms: dict[str, float]
    k: int = 64


SHAPES = {
    # parameters: 4 layers of 12 D^2 through layer 3; about 77 M each through layer 12; 193 M each through layer 18
    "S1": Shape("EleutherAI/pythia-70m-deduped", 12.6e6, 512, 2**14, 2048, {"ideal": 0.43, "dense": 0.67}),
    "S2": Shape("google/gemma-2-2b", 1.0e9, 2304, 2**14, 2048, {"ideal": 1.8, "dense": 2.55}),
    "S3": Shape("google/gemma-2-2b", 1.0e9, 2304, 2**16, 2048, {"ideal": 5.6, "dense": 10.2}),
    "S4": Shape("Qwen/Qwen3-8B", 3.7e9, 4096, 2**16, 4096, {"ideal": 12.3, "dense": 25.2}),
}


# -- the formulas


def rows_bytes(B: int, D: int, readers: dict[int, list[int]], W: int, element: int) -> float:
    """Bytes of activations that all processes send for B tokens: a reader gets what it has not run itself.

    B D element (W - 1)/W for each reader of each layer, where all processes run the LLM on as many tokens.
    """
    return B * D * element * (W - 1) / W * sum(map(len, readers.values()))


def collectives(architecture: str, B: int, D: int, F: int, k: int, W: int, element: int, tiled: bool) -> Iterator:
    """(operation, bytes that each process hands in) of a step with latents split over W processes, kernels/shard.py.

    Not among them: what is logged, the auxiliary loss of dead latents, ties and second passes of BatchTopK's selection.
    tiled: as on a CPU, where BatchTopK's selection first agrees on a bound.
    """
    if architecture == "top_k":
        yield "all_gather", B * min(k, F // W) * element  # candidates of each token
    if architecture == "batch_top_k":
        if tiled:
            yield from (("all_reduce", element), ("all_reduce", 8))  # the bound, and how many are above it
        yield "all_gather", B * k * element  # candidates of the batch
    yield "all_reduce", 4 * B * D  # x_hat
    if architecture == "standard":
        yield "all_reduce", 4 * B  # the L1 norms
    yield "all_reduce", 4 * D  # the gradient of b_dec
    yield "all_reduce", 4  # the gradient's norm
    if architecture in ("top_k", "batch_top_k"):
        yield "all_reduce", 4 * B  # each token's smallest active, for the threshold


FORMULAS = {
    "top_k": "4B min(k, F/W) + 4BD + 4B + 4D + 4",
    "batch_top_k": "4Bk + 4BD + 4B + 4D + 16",
    "standard": "4BD + 4B + 4D + 4",
}


# -- measured: a process of torchrun


def work(folder: Path, arguments: list[str]) -> int:
    """Run demo.py with these flags, and write what this rank counts from step FIRST to LAST."""
    import torch.distributed as dist

    import demo
    from dictionary_learning import training
    from dictionary_learning.buffer import ActivationBuffer

    spent: dict[str, float] = {"all_reduce": 0, "all_gather": 0, "collectives": 0.0}

    def count(name: str, i_tensor: int) -> None:
        function = getattr(dist, name)

        def counted(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            if group is None:  # of the world, not of a split SAE
                return function(*args, **kwargs)
            start = time.perf_counter()
            function(*args, group=group, **kwargs)
            spent["collectives"] += time.perf_counter() - start
            spent[name] += args[i_tensor].nbytes

        setattr(dist, name, counted)

    count("all_reduce", 0)
    count("all_gather", 1)

    class MeasuredLoop(training.Loop):
        def train(self) -> None:
            self.steps, self.batches = LAST + 1, self.measured(self.batches)
            super().train()

        def measured(self, buffer: Any) -> Iterator:
            assert isinstance(buffer, ActivationBuffer)
            before: dict[str, float] = {}
            for step in itertools.count():
                now = {**spent, "exchange": 0.0, **buffer.seconds, "seconds": time.perf_counter()}
                if step == FIRST:
                    before = now
                if step == LAST:
                    found: dict[str, Any] = {name: now[name] - before[name] for name in now}
                    rows = buffer.counts["tokens"] - buffer.counts["bos"] - buffer.counts["outliers"]
                    found |= {"rows": rows, "sent": self.world.bytes_sent, "readers": buffer.source.readers}
                    (folder / f"{self.world.rank}.json").write_text(json.dumps(found))
                yield next(buffer)

    training.Loop = MeasuredLoop
    return demo.main([*arguments, "--save_dir", str(folder / "saes")])


def measure(W: int, flags: list[str]) -> list[dict[str, Any]]:
    """What W processes counted, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(W), "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", __file__, "--worker", folder, *FLAGS, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(W)]
    for rank in found:
        rank["own"] = rank["text"] + rank["llm"]
        rank["SAE"] = rank["seconds"] - rank["own"] - rank["exchange"] - rank["collectives"]
        rank["own"] += rank["SAE"]
    return found


def compared(counted: float, formula: float) -> tuple[str, str, str]:
    difference = (counted - formula) / formula if formula else 0.0
    return f"{counted:,.0f}", f"{formula:,.0f}", f"{difference:+.2%}"


def measured_cells(found: list[dict[str, Any]]) -> tuple[list[str], tuple[str, str, str]]:
    """(tokens/s and the slowest rank's seconds, bytes of activations for B tokens: counted, formula, difference)"""
    W, rows, slowest = len(found), found[0]["rows"], max(found, key=lambda rank: rank["own"])
    seconds = [f"{slowest[name]:.2f}" for name in ("text", "llm", "SAE", "exchange", "collectives")]
    readers = found[0]["readers"]
    if W > 1:  # the law behind the formula holds to the byte: what a rank sends are its own rows, to each other reader
        elsewhere = [sum(len(set(ranks) - {rank}) for ranks in readers.values()) for rank in range(W)]
        own_rows = [rank["sent"] / (4 * DIM * n) for rank, n in zip(found, elsewhere, strict=True)]
        assert sum(own_rows) == rows, (own_rows, rows)
    sent = sum(rank["sent"] for rank in found) * BATCH / rows
    speed = (LAST - FIRST) * BATCH / max(rank["seconds"] for rank in found)
    return [f"{speed:,.0f}", *seconds], compared(sent, rows_bytes(BATCH, DIM, readers, W, 4))


def print_table(columns: list[str], rows: Iterator[list[str]]) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


SECONDS = ["tokens/s", "text s", "LLM s", "SAE s", "exchange s", "collectives s"]
BYTES = ["sent, bytes/step", "formula", "difference"]


def print_measured(processes: list[int], parts: list[str]) -> None:
    print(f"### Measured: {os.cpu_count()} cores, CPU, gloo, one thread a process\n")
    print(
        f"tiny-python (D {DIM}), F {WIDTH}, B {BATCH}, k {K}, steps {FIRST} to {LAST}.\n"
        f"The single-threaded processes share the {os.cpu_count()} cores of this machine: with more processes than "
        "cores,\ntime shows overhead and not speed-up; with fewer, cores are idle. Seconds are of the rank with most\n"
        "work of its own; waiting for others is in `exchange` (activations) and `collectives` (of split SAEs).\n"
    )
    if "many" in parts:

        def many() -> Iterator[list[str]]:
            for W in processes:
                found = measure(W, f"--architectures top_k --layers 1 2 --target_l0s {K} {2 * K}".split())
                cells, sent = measured_cells(found)
                yield [str(W), ", ".join(str(len(ranks)) for ranks in found[0]["readers"].values()), *cells, *sent]

        print("Four TopK SAEs, two on each of two layers. Formula, of all ranks: 4BD (W-1)/W for each reader, layer.\n")
        print_table(["W", "R by layer", *SECONDS, *BYTES], many())
    if "split" in parts:

        def split() -> Iterator[list[str]]:
            for architecture, W in itertools.product(ARCHITECTURES, processes):
                flags = f"--layers 2 --target_l0s {K} --shard_latents {W} --architectures {architecture}"
                found = measure(W, flags.split())
                cells, sent = measured_cells(found)
                counted = (found[0]["all_reduce"] + found[0]["all_gather"]) / (LAST - FIRST)
                formula = sum(n for _, n in collectives(architecture, BATCH, DIM, WIDTH, K, W, 4, tiled=True))
                handed = compared(counted, formula if W > 1 else 0)
                yield [architecture, str(W), *cells, *sent, *handed, FORMULAS[architecture]]

        print("\nOne SAE, its latents split over all processes; `handed in` to collectives, by each rank.\n")
        handed = ["handed in, bytes/step", "formula", "difference", "="]
        print_table(["SAE", "W", *SECONDS, *BYTES, *handed], split())


# -- modelled


def llm_and_exchange(shape: Shape, W: int, R: int, buffer_tokens: int) -> tuple[float, float, int]:
    """(seconds of the LLM, seconds of waiting for activations) of a step, and how many GPUs run the LLM at a time.

    The buffer is filled when half of it is read.  A fill of C/2 tokens takes waves of at most one LLM batch a GPU; the
    rows of a wave travel while the next one is run, and those of a fill's last wave while nothing is.
    """
    from demo_config import DEFAULTS, LLM_CONFIG
    from dictionary_learning.sweep import Sweep

    sweep = Sweep.of(DEFAULTS, **LLM_CONFIG[shape.model])
    batch = sweep.llm_batch_size * sweep.context_length  # tokens
    n_batches = math.ceil(buffer_tokens / 2 / batch)
    n_waves, runners = math.ceil(n_batches / W), min(n_batches, W)
    llm = 2 * shape.parameters * batch / LLM_FLOPS
    # a runner sends its batch to all readers, a reader gets those of all runners; the busier of them decides
    n_bytes = batch * shape.D * ELEMENT * max(runners * (W - 1) / W, R - 1)
    transfer = n_bytes / (NODE_BANDWIDTH if W <= NODE_GPUS else NET_BANDWIDTH) if W > 1 else 0.0
    latency = 2 * LATENCY if W > 1 else 0.0  # the report about a wave, and the exchange
    waiting = transfer + (n_waves - 1) * max(0.0, transfer - llm) + n_waves * latency
    steps = n_batches * batch / shape.B  # of a fill
    return n_waves * llm / steps, waiting / steps, runners


def modelled_row(name: str, kind: str, W: int, n_saes: int, split: str | None, buffer_tokens: int) -> list[str]:
    """One SAE with its latents split over W, as `split` (an architecture) does it, or n_saes spread over W."""
    shape = SHAPES[name]

    def parts(W: int) -> tuple[dict[str, float], int]:
        R = W if split else min(n_saes, W)
        llm, exchange, runners = llm_and_exchange(shape, W, R, buffer_tokens)
        sae = shape.step_ms[kind] / 1e3 * (1 / W if split else math.ceil(n_saes / W))
        talk = 0.0
        if split and W > 1:
            ways = {"all_reduce": 2 * (W - 1) / W, "all_gather": W - 1}  # bytes a ring moves for each handed in
            bandwidth = NODE_BANDWIDTH if W <= NODE_GPUS else NET_BANDWIDTH
            for operation, n in collectives(split, shape.B, shape.D, shape.F, shape.k, W, ELEMENT, tiled=False):
                talk += LATENCY + ways[operation] * n / bandwidth
        return {"LLM": llm, "SAE": sae, "exchange": exchange, "collectives": talk}, runners

    seconds, runners = parts(W)
    total, alone = sum(seconds.values()), sum(parts(1)[0].values())
    what = f"one {split}, split" if split else f"{n_saes} SAEs"
    cells = [name, what, kind, str(W), f"{runners}, {W if split else min(n_saes, W)}"]
    cells += [f"{24 * shape.D * shape.F * (1 / W if split else math.ceil(n_saes / W)) / 1e9:.1f}"]
    cells += [f"{1e3 * seconds[part]:.3f}" for part in seconds]
    return [*cells, f"{shape.B / total:,.0f}", f"{alone / total:.1f}", max(seconds, key=lambda part: seconds[part])]


def print_model(buffer_tokens: int) -> None:
    print("\n### Modelled, not measured: H100s\n")
    print(
        f"Milliseconds of a step, one after the other: LLM and SAEs share a GPU. Buffer of {buffer_tokens:,} tokens.\n"
        "`exchange`: of the activations' way, what the next wave of the LLM does not hide. A split SAE's own work is\n"
        "taken as 1/W of the whole's. `ideal`, `dense`: rooflines of the step; `given`: --step_ms.\n"
        f"Assumed: LLM at {LLM_FLOPS / 1e12:.0f} TFLOP/s, {NODE_BANDWIDTH / 1e9:.0f} GB/s in a node of {NODE_GPUS}, "
        f"{NET_BANDWIDTH / 1e9:.0f} GB/s a GPU for all\nthat travels in more than one, {LATENCY * 1e6:.0f} us a "
        "collective, bf16. GB: weights and moments of the SAEs of a GPU in\n"
        "fp32; an H100 has 80, so the rows above it, kept as the base of `x 1 GPU`, are of runs that do not fit.\n"
    )
    for name, shape in SHAPES.items():
        print(
            f"- {name}: D {shape.D}, F {shape.F}, B {shape.B}, k {shape.k}; {shape.model}, "
            f"{2 * shape.parameters / 1e9:.3g} GFLOP/token to its layer"
        )
    print()

    def rows() -> Iterator[list[str]]:
        for name, shape in SHAPES.items():
            for kind, W in itertools.product(shape.step_ms, GPUS):
                yield modelled_row(name, kind, W, N_SAES, None, buffer_tokens)
        for name in ("S3", "S4"):
            for kind, split, W in itertools.product(SHAPES[name].step_ms, ("top_k", "batch_top_k"), (1, SPLIT)):
                yield modelled_row(name, kind, W, 1, split, buffer_tokens)

    parts = ["LLM ms", "SAE ms", "exchange ms", "collectives ms"]
    columns = ["", "what", "step", "GPUs", "of them run LLM, read", "GB", *parts, "tokens/s", "x 1 GPU", "bottleneck"]
    print_table(columns, rows())


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        code = work(Path(sys.argv[2]), sys.argv[3:])
        sys.stderr.flush()
        os._exit(code)  # as demo.py ends under torchrun
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["many", "split", "model"], choices=["many", "split", "model"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--buffer_tokens", type=int, default=250_000, help="of the model; default: demo_config.py's")
    parser.add_argument("--step_ms", nargs="+", default=[], metavar="S1=0.9", help="measured ones, of one GPU")
    args = parser.parse_args()
    for name, _, milliseconds in (given.partition("=") for given in args.step_ms):
        if name not in SHAPES:
            parser.error(f"--step_ms knows the shapes {', '.join(SHAPES)}, not {name}.")
        SHAPES[name].step_ms.clear()
        SHAPES[name].step_ms["given"] = float(milliseconds)
    if {"many", "split"} & set(args.parts):
        print_measured(args.processes, args.parts)
    if "model" in args.parts:
        print_model(args.buffer_tokens)


if __name__ == "__main__":
    main()
