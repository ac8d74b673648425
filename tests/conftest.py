"""What every test may use: a tiny random GPT-NeoX with a byte-level tokenizer, made in memory and on disk."""

import os
import time
from pathlib import Path

import pytest
import torch
from hub_server import HubServer

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
torch.set_num_threads(1)  # tensors are tiny, and workers run side by side


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Called, makes torch's kernels take the ways that they take on a GPU."""
    from dictionary_learning.kernels import select, sparse
    from dictionary_learning.trainers import trainer

    def use() -> None:
        for module in (select, sparse):
            monkeypatch.setattr(module, "on_cpu", lambda tensor: False)
        monkeypatch.setattr(trainer, "SPARSE_BELOW", {})

    return use


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, `<|endoftext|>` (id 0) as bos and eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=10**9
    )


@pytest.fixture(scope="session")
def tiny_model_folder(tokenizer, tmp_path_factory) -> Path:
    """A folder that `from_pretrained` opens: 4 layers, D = 16, V = 257, random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that this process's huggingface_hub talks to, logged in as alice."""
    import huggingface_hub

    settings = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache")}
    with HubServer() as server:
        # from the environment they are read once, at the import
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {"ENDPOINT": server.url, "HF_TOKEN_PATH": str(tmp_path / "none"), **settings}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # would keep the address of an earlier server
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def out_of_reach(server, monkeypatch):
    """Called with "fails" or "is gone", makes the Hub do so; whoever then waits for it fails."""
    import huggingface_hub

    def lose(how: str) -> None:
        if how == "fails":
            server.fail = lambda method, path: 503
        else:
            url = "http://127.0.0.1:9"
            template = url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
            monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))

    return lose
