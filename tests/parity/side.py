"""One side of the comparison: train, save and load with whichever `dictionary_learning` is on the path.

The tests import this file for our side.  As a script it is the reference's side, in a process of its own, because both
packages have one name:

    python side.py FOLDER REQUEST ANSWER

FOLDER holds the reference's package; REQUEST and ANSWER are files of `torch.save`.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import torch

# what the reference imports and nothing here uses
HEAVY = {"circuitsvis", "datasets", "nnsight", "pandas", "plotly", "transformers", "umap", "wandb", "zstandard"}


def train(case: dict, batches_SBD: torch.Tensor) -> tuple:
    """(trainer, record) of training on the batches of S steps.

    case: module and trainer (names under `dictionary_learning.trainers`), settings, dead_feature_threshold.
    record: initial and final state dict of the SAE, config, and of every step what the trainer counted.
    """
    trainers = importlib.import_module(f"dictionary_learning.trainers.{case['module']}")
    torch.set_num_threads(1)  # for so small tensors, threads only wait for each other
    torch.manual_seed(case["settings"]["seed"])  # the reference's JumpReLU seeds nothing itself
    trainer = getattr(trainers, case["trainer"])(**case["settings"])
    trainer.dead_feature_threshold = case["dead_feature_threshold"]
    initial = snapshot(trainer.ae)
    trace = []
    for step, x_BD in enumerate(batches_SBD):
        trainer.update(step, x_BD.clone())
        counted = {name: getattr(trainer, name) for name in ("p", "next_p", "sparsity_coeff") if hasattr(trainer, name)}
        if hasattr(trainer, "num_tokens_since_fired"):
            counted["silent_F"] = trainer.num_tokens_since_fired.clone()
        if hasattr(trainer.ae, "threshold"):
            counted["threshold"] = trainer.ae.threshold.detach().clone()
        trace.append(counted)
    return trainer, {"initial": initial, "final": snapshot(trainer.ae), "config": dict(trainer.config), "trace": trace}


def snapshot(ae) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in ae.state_dict().items()}


@torch.no_grad()
def look(ae, x_BD: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(f_BF, x_hat_BD) of an SAE, for the top-k family by threshold and by selection."""
    ways = [{"use_threshold": True}, {"use_threshold": False}] if hasattr(ae, "k") else [{}]
    features = [ae.encode(x_BD, **way) for way in ways]
    return [(f_BF, ae.decode(f_BF)) for f_BF in features]


class Stub(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})  # whatever is imported from it is some class


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty packages in the place of the heavy ones."""

    def find_spec(self, fullname, path=None, target=None):
        return (
            importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in HEAVY else None
        )

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def main(folder: str, request_file: str, answer_file: str) -> None:
    sys.path.insert(0, folder)
    sys.meta_path.insert(0, Stubs())
    utils = importlib.import_module("dictionary_learning.utils")
    dictionary = importlib.import_module("dictionary_learning.dictionary")
    assert Path(folder).resolve() in Path(utils.__file__).resolve().parents, "that is not the reference"

    clip, norms = torch.nn.utils.clip_grad_norm_, []
    torch.nn.utils.clip_grad_norm_ = lambda *args, **kwargs: norms.append(float(norm := clip(*args, **kwargs))) or norm

    request = torch.load(request_file)
    records, looks = {}, {}
    for name, case in request["cases"].items():
        trainer, record = train(case, request["batches_SBD"])
        records[name] = {**record, "grad_norms": list(norms)}
        norms.clear()
        trainer.ae.scale_biases(request["norm_factor"])
        save(Path(request["folder"]) / name, trainer.ae, {"trainer": trainer.config, "buffer": request["buffer"]})
    new = dictionary.AutoEncoderNew(**request["sizes"])
    new_config = {"trainer": {"dict_class": "AutoEncoderNew", **request["sizes"]}, "buffer": request["buffer"]}
    save(Path(request["folder"]) / "AutoEncoderNew", new, new_config)
    for whose in ("folder", "their_folder"):
        for path in sorted(Path(request[whose]).iterdir()):
            ae, _ = utils.load_dictionary(str(path), "cpu")
            looks[whose, path.name] = look(ae, request["x_BD"])
    torch.save({"records": records, "looks": looks}, answer_file)


def save(folder: Path, ae, config: dict) -> None:
    """As the reference's training loop ends."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    torch.save({name: tensor.cpu() for name, tensor in ae.state_dict().items()}, folder / "ae.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
