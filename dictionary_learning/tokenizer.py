"""The tokenizer of a model: the ids that the model was trained on, and the tokens that mark its texts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .pretrained import Pretrained

DOCUMENT_SEPARATOR = "<|endoftext|>"  # of GPT-2 and of most models since that have no bos
PROBES = (
    "It cost 1,234.50 in 2023, not 1999.",
    "  two  spaces,\ttabs\n\n    and a new paragraph ",
    "def f(x_1, *args):\n    return {'a': x_1 != 0}  # 100%",
    "Grüße, naïve café, привет мир, 你好世界, ありがとう, مرحبا 🙂",
    "GATTACA don't WON'T e-mail@example.org",
)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a Hub id, a local folder or the built-in model.

    Where there is a `tokenizer.json`, token ids are those of `tokenizers.Tokenizer.from_file`: transformers makes some
    tokenizers anew from the vocabulary alone, with the pre-tokenizer of their class in the place of the file's.

    Raises ValueError where there is none.
    """
    return tokenizer_of(Pretrained(name, revision, trust_remote_code))


def tokenizer_of(model: Pretrained) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with model.one_sentence():
        path = model.file("tokenizer.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.source, **model.options)
        except Exception:
            if path is None:
                raise
            # the class that the config names cannot be made of this file, which stands for itself
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model.source, **model.options)
        if path is not None:
            tokenizer = _of_file(path, tokenizer)
    ids = set(tokenizer.get_vocab().values())
    if ids <= set(tokenizer.all_special_ids):  # made from the config, with no vocabulary
        raise ValueError(f"cannot load {model.name!r}: it has no tokenizer")
    return tokenizer


def _of_file(path: Path, made: Any) -> Any:
    """The tokenizer of a `tokenizer.json`, with the special tokens and the chat template of the one that was made.

    Special tokens that the file does not know would get ids of their own, so they are left out.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(path))
    known = backend.get_vocab()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=made.chat_template,
        model_max_length=made.model_max_length,
        padding_side=made.padding_side,
        clean_up_tokenization_spaces=made.clean_up_tokenization_spaces,
        extra_special_tokens=[str(token) for token in made.extra_special_tokens if str(token) in known],
        **{role: token for role, token in made.special_tokens_map.items() if token in known},
    )
    tokenizer.name_or_path = made.name_or_path
    backend.no_truncation()
    backend.no_padding()
    for text in PROBES:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if ids != backend.encode(text, add_special_tokens=False).ids:
            raise ValueError(f"its tokens of {text!r} are not those of its {path.name}")
    return tokenizer


def check_token_ids(tokenizer: Any, n_embeddings: int, name: str) -> None:
    """Raises ValueError where text or padding can give a token whose id is beyond the model's embedding.

    Special tokens without a role may be (Gemma 3's `<image_soft_token>` is): text does not give them.
    """
    added = tokenizer.added_tokens_decoder
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    beyond = [(i, token) for token, i in tokenizer.get_vocab().items() if i >= n_embeddings]
    beyond = sorted((i, token) for i, token in beyond if i in roles or not (i in added and added[i].special))
    if beyond:
        i, token = beyond[0]
        raise ValueError(
            f"the tokenizer of {name!r} has {len(beyond)} tokens beyond the {n_embeddings} rows of the model's "
            f"embedding, such as {token!r} ({i}): take the tokenizer that the model was trained with, or save the "
            f"model anew after resize_token_embeddings({len(tokenizer)})"
        )


class TextMarks(NamedTuple):
    """Token ids: what a context begins with, what stands between two documents, what fills a short context."""

    bos_id: int
    separator_id: int
    pad_id: int


def text_marks(tokenizer: Any, eos_ids: Iterable[int] = ()) -> TextMarks:
    """The tokens that mark texts as the model saw them in pre-training.

    Documents are separated by eos, but not by a token that the chat template names: the eos of an instruct model
    (`<|im_end|>` of Qwen3) ends a turn, not a document. Then it is the first of eos_ids (of the generation config) and
    `<|endoftext|>` that the template does not name, else bos, or pad where there is no bos. A context begins with bos,
    or with the separator where there is none, or one that begins the turns of chats (`<|im_start|>` of SmolLM2). BERT's
    are `[CLS]` and `[SEP]`.

    Raises ValueError where there is no such token.
    """
    bos_id, eos_id, pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if bos_id is None and eos_id is None:  # BERT has other names for them
        bos_id, eos_id = (getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep"))
    template = getattr(tokenizer, "chat_template", None)
    candidates = [eos_id]
    if template:
        text = " ".join(template.values()) if isinstance(template, dict) else template
        added = tokenizer.added_tokens_decoder
        candidates += [i for i in eos_ids if i in added and added[i].special]
        candidates += [tokenizer.get_vocab().get(DOCUMENT_SEPARATOR), pad_id if bos_id is None else None]
        candidates = [i for i in candidates if i is not None and tokenizer.convert_ids_to_tokens(i) not in text]
    elif bos_id is None:
        candidates.append(pad_id)
    separator_id = next((i for i in [*candidates, bos_id] if i is not None), None)
    if separator_id is None:
        what = "only tokens of its chat template" if template and eos_id is not None else "no eos token"
        advice = "name a pad_token in tokenizer_config.json that ends documents, such as <|endoftext|>"
        raise ValueError(f"the tokenizer has {what} to separate documents with: {advice}")
    return TextMarks(
        bos_id=separator_id if bos_id is None or (template and _begins_turns(tokenizer)) else bos_id,
        separator_id=separator_id,
        pad_id=separator_id if pad_id is None else pad_id,
    )


def _begins_turns(tokenizer: Any) -> bool:
    """Whether the chat template writes bos more than once in a question and its answer."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False).count(tokenizer.bos_token) > 1
    except Exception:  # a template is a program of the model's authors, and chats are not asked for here
        return False


def generation_eos_ids(name: str, revision: str | None = None) -> list[int]:
    """The eos ids of a model's generation config, for `text_marks`; none where it has no such config."""
    import json

    model = Pretrained(name, revision)
    with model.one_sentence():
        path = model.file("generation_config.json")
        return [] if path is None else as_ids(json.loads(path.read_bytes()).get("eos_token_id"))


def as_ids(eos: int | list[int] | None) -> list[int]:
    """One id, several or none, as configs have it."""
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
