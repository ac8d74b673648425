"""Do two versions of the program write the same bytes?

    git worktree add /tmp/before COMMIT
    python benchmarks/same_bytes.py run /tmp/before /tmp/out_before
    python benchmarks/same_bytes.py run . /tmp/out_after
    python benchmarks/same_bytes.py compare /tmp/out_before /tmp/out_after

`run` takes a checkout through five runs on the built-in model: the default one, all eight architectures on two layers,
the same evaluated again, stopped by SIGTERM and resumed, and in two processes.  `compare` reads every weight file,
density, `metrics.jsonl` and `eval_results.json` of both, and ends with 1 if one differs or is there only once.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ALL = "p_anneal standard standard_new gated top_k batch_top_k matryoshka_batch_top_k jump_relu".split()
SMALL = ["--num_tokens", "60000", "--layers", "1", "2", "--architectures", *ALL]
COMPARED = {"ae.pt", "sae_weights.safetensors", "density.safetensors", "metrics.jsonl", "eval_results.json"}


def run(checkout: Path, out: Path) -> None:
    out = out.resolve()
    demo = [str(checkout.resolve() / "demo.py")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def call(*command: str) -> None:
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)

    call(sys.executable, *demo, "--save_dir", str(out / "default"))
    call(sys.executable, *demo, "--save_dir", str(out / "eight"), *SMALL)
    (folder,) = (out / "eight").iterdir()
    call("cp", "-r", str(folder), str(out / "evaluated"))
    call(sys.executable, *demo, "--eval_only", str(out / "evaluated"))

    stopped = [sys.executable, *demo, "--save_dir", str(out / "stopped"), *SMALL, "--backup_steps", "40"]
    process = subprocess.Popen(stopped, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    while not list((out / "stopped").rglob("state_40")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 75:
        raise SystemExit("the run was not stopped in time")
    call(*stopped, "--resume")

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call(*torchrun, *demo, "--save_dir", str(out / "two"), *SMALL)


def compare(before: Path, after: Path) -> int:
    found = [
        {path.relative_to(out): path for path in out.rglob("*") if path.name in COMPARED} for out in (before, after)
    ]
    differ = []
    for name in sorted(found[0].keys() | found[1].keys()):
        sides = [side.get(name) for side in found]
        if None in sides or sides[0].read_bytes() != sides[1].read_bytes():
            differ.append(name)
    print(f"{len(found[0])} and {len(found[1])} files, {len(differ)} differ")
    print("\n".join(map(str, differ)))
    return 1 if differ or not found[0] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "compare"))
    parser.add_argument("first", type=Path, help="run: a checkout; compare: an output folder")
    parser.add_argument("second", type=Path, help="an output folder")
    args = parser.parse_args()
    if args.what == "compare":
        return compare(args.first, args.second)
    run(args.first, args.second)
    return 0


if __name__ == "__main__":
    sys.exit(main())
