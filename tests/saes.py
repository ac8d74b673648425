"""Random SAEs of every class, with their configs, and a pickle that means harm."""

import os

import torch

from dictionary_learning.dictionary import DICTIONARIES, Dictionary, TopKDictionary

D, F, K = 6, 16, 3


def make_sae(name: str) -> Dictionary:
    """A random SAE of a class, biases and thresholds included, decoder rows of unit norm."""
    settings = {"k": K} if issubclass(DICTIONARIES[name], TopKDictionary) else {}
    if name == "MatryoshkaBatchTopKSAE":
        settings["group_sizes"] = [4, 12]
    generator = torch.Generator().manual_seed(0)
    ae = DICTIONARIES[name](D, F, generator=generator, **settings)
    with torch.no_grad():
        for parameter in ae.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.1 * torch.rand(parameter.shape, generator=generator))
        if isinstance(ae, TopKDictionary):
            ae.threshold.fill_(0.25)
        ae.decoder_FD.div_(ae.decoder_FD.norm(dim=1, keepdim=True))
    return ae


def config_of(ae: Dictionary) -> dict:
    trainer = {
        "trainer_class": "SomeTrainer",
        "dict_class": type(ae).__name__,
        "activation_dim": D,
        "dict_size": F,
        "layer": 3,
        "lm_name": "user/lm",
    }
    if isinstance(ae, TopKDictionary):
        trainer["k"] = K
    return {"trainer": trainer, "buffer": {"ctx_len": 128}}


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice",)
