"""Token ids are those of the model's tokenizer.json, and the tokens that mark texts are those of pre-training."""

import copy
import json
import shutil

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dictionary_learning.data.contexts import text_encoder
from dictionary_learning.model import (
    check_token_ids,
    generation_eos_ids,
    load_model,
    load_tokenizer,
    text_marks,
)

TEXTS = [
    "In 2023 and 1999, 1234567 of 89%.",
    "  leading, double  and trailing spaces \n\n\tand tabs",
    "for i in range(100): x[i] += '</s>' if not i else None",
    "Ünïcödé, привет, 你好, مرحبا 🙂",
    "<s> no control token </s> <|endoftext|>",
]
LETTERS = sorted({character for text in TEXTS for character in text})


def bpe(pre_tokenizer, normalizer=None, alphabet=()) -> Tokenizer:
    """A BPE whose merges go over digits and punctuation, so that only the pre-tokenizer keeps them apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Metaspace(), normalizer
    if alphabet is not None and not alphabet:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=list(alphabet), special_tokens=["<s>", "</s>", "<|endoftext|>"]
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def words() -> Tokenizer:
    vocab = {"<s>": 0, "</s>": 1, "[UNK]": 2}
    vocab |= {
        word: i + 3 for i, word in enumerate(sorted({word for text in TEXTS for word in text.split()} - set(vocab)))
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *[(letter, -5.0) for letter in LETTERS]]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁and", -3.0), ("20", -3.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def bytes_after(*first) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PIPELINES = {
    "bytes": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes, prefix space": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "bytes, no regex": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "single digits": lambda: bpe(bytes_after(pre_tokenizers.Digits(individual_digits=True))),
    "punctuation": lambda: bpe(bytes_after(pre_tokenizers.Punctuation())),
    "bytes, lowercase": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
    "bytes, bos": lambda: with_bos(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))),
    "metaspace": lambda: bpe(pre_tokenizers.Metaspace(), alphabet=LETTERS),
    "metaspace, no prefix": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="never"), alphabet=LETTERS),
    "unigram": unigram,
    "words": words,
}
CLASSES = [
    (None, "gpt2"),
    ("PreTrainedTokenizerFast", "llama"),
    ("GPT2Tokenizer", "llama"),
    ("LlamaTokenizerFast", "llama"),
    ("LlamaTokenizer", "mistral"),
    ("GPTNeoXTokenizerFast", "gpt_neox"),
    ("Qwen2Tokenizer", "qwen2"),
    ("GemmaTokenizerFast", "gemma2"),
    ("T5TokenizerFast", "llama"),
    ("BertTokenizerFast", "llama"),
    ("NeverHeardOfTokenizer", "llama"),
]


def folder_of(tmp_path, tokenizer: Tokenizer, model_type="llama", generation=None, **config):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return str(tmp_path)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("tokenizer_class, model_type", CLASSES)
def test_ids_are_those_of_the_file_whatever_the_class(tokenizer_class, model_type, pipeline, tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    config |= {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    folder = folder_of(tmp_path, PIPELINES[pipeline](), model_type, **config)
    tokenizer, file = load_tokenizer(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")
    for add in [False, True]:
        expected = [encoding.ids for encoding in file.encode_batch(TEXTS, add_special_tokens=add)]
        assert tokenizer(TEXTS, add_special_tokens=add).input_ids == expected
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (file.token_to_id("<s>"), file.token_to_id("</s>"))
    assert len(tokenizer) == file.get_vocab_size()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_special_tokens_in_documents_are_text(pipeline, tmp_path):
    folder = folder_of(tmp_path, PIPELINES[pipeline](), bos_token="<s>", eos_token="</s>")
    tokenizer, file = load_tokenizer(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")
    special = {i for i, token in file.get_added_tokens_decoder().items() if token.special}
    chat = tokenizer(TEXTS, add_special_tokens=False).input_ids
    ids = tokenizer(TEXTS, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer(TEXTS, add_special_tokens=False).input_ids == chat  # the next call is its own
    assert special & set(chat[-1])
    file.encode_special_tokens = True
    assert ids == [encoding.ids for encoding in file.encode_batch(TEXTS, add_special_tokens=False)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_documents_have_no_special_token_whatever_the_vocabulary(pipeline, tmp_path):
    """Unigram and words have special tokens as pieces like any other, and some merges make them."""
    folder = folder_of(tmp_path, PIPELINES[pipeline](), bos_token="<s>", eos_token="</s>")
    tokenizer, file = load_tokenizer(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")
    encode = text_encoder(tokenizer)
    special = {i for i, token in file.get_added_tokens_decoder().items() if token.special}
    written = [*TEXTS, "<s>", "x</s>x", "a </s> b", "<|endoftext|>"]
    assert special.isdisjoint(i for ids in encode(written) for i in ids)
    plain = [*TEXTS[:2], TEXTS[3], "for", "zzz of"]
    assert encode(plain) == [file.encode(text, add_special_tokens=False).ids for text in plain]
    assert special & set(tokenizer("a </s> b").input_ids)  # the tokenizer itself is as it was


def test_what_the_file_and_the_config_say_beside_the_ids_is_kept(tmp_path):
    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    folder = folder_of(
        tmp_path,
        tokenizer,
        tokenizer_class="GPT2Tokenizer",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=77,
        chat_template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    )
    loaded = load_tokenizer(folder)
    assert loaded.name_or_path == folder and loaded.model_max_length == 77
    assert {"<|im_start|>", "<|im_end|>"} <= set(loaded.all_special_tokens)
    ids = loaded.apply_chat_template([{"role": "user", "content": "In 2023"}], return_dict=False)
    start, end = loaded.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids[0], ids[-1]) == (start, end) and loaded.decode(ids[1:-1]) == "In 2023"
    assert [len(ids) for ids in loaded(["x" * 50, "x"]).input_ids] == [50, 1]  # neither cut nor padded


def test_roles_that_only_the_class_knows_are_kept(tmp_path):
    folder = folder_of(tmp_path, bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt2", model_max_length=64)
    tokenizer = load_tokenizer(folder)  # as GPT-2's own folder, which names no special token
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == Tokenizer.from_file(f"{folder}/tokenizer.json").token_to_id("<|endoftext|>")


def test_an_alphabet_without_the_latin_letters_is_a_tokenizer(tmp_path):
    tokenizer = Tokenizer(models.BPE({"[UNK]": 0, "A": 1, "C": 2, "G": 3, "T": 4}, [], unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]"])
    folder = folder_of(tmp_path, tokenizer, unk_token="[UNK]", tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(folder)("GATTACA").input_ids == [3, 1, 4, 4, 1, 2, 1]


# what begins contexts and stands between documents

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>", "<|end_of_text|>", "<|eot_id|>"]
IDS = {token: i for i, token in enumerate(VOCABULARY)}


@pytest.mark.parametrize(
    "special, template, eos, expected",
    [
        # no chat template: bos and eos as they are
        ({"bos": "<s>", "eos": "</s>", "pad": "<pad>"}, None, [], ("<s>", "</s>", "<pad>")),
        ({"eos": "<|endoftext|>"}, None, [], ("<|endoftext|>",) * 3),
        ({"bos": "<s>"}, None, [], ("<s>",) * 3),
        ({"cls": "<s>", "sep": "</s>", "pad": "<pad>"}, None, [], ("<s>", "</s>", "<pad>")),
        ({"pad": "<|endoftext|>"}, None, [], ("<|endoftext|>",) * 3),
        # Qwen3: by pad, by the generation config, by name
        ({"eos": "<|im_end|>", "pad": "<|endoftext|>"}, CHATML, [], ("<|endoftext|>",) * 3),
        ({"eos": "<|im_end|>"}, CHATML, [2, 6], ("<|end_of_text|>",) * 3),
        ({"eos": "<|im_end|>"}, CHATML, [2], ("<|endoftext|>",) * 3),
        ({"eos": "<|im_end|>", "pad": "<pad>"}, {"default": CHATML}, 2, ("<|endoftext|>", "<|endoftext|>", "<pad>")),
        # Llama 3: the pad token is no end of documents, the generation config names it
        (
            {"bos": "<s>", "eos": "<|eot_id|>", "pad": "<pad>"},
            "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}",
            [7, 6],
            ("<s>", "<|end_of_text|>", "<pad>"),
        ),
        # SmolLM2: what begins a turn is called bos
        (
            {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<pad>"},
            CHATML,
            [2],
            ("<|endoftext|>",) * 2 + ("<pad>",),
        ),
        # Mistral: the template ends turns with eos, whichever that is
        ({"bos": "<s>", "eos": "</s>"}, "{{ bos_token }}{{ messages }}{{ eos_token }}", 4, ("<s>", "</s>", "</s>")),
    ],
)
def test_marks_are_those_of_documents_never_of_the_chat_template(special, template, eos, expected, tmp_path):
    tokenizer = Tokenizer(models.WordLevel(dict(IDS, word=8), unk_token="word"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in VOCABULARY])
    config = {f"{role}_token": token for role, token in special.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    config |= {} if template is None or isinstance(template, dict) else {"chat_template": template}
    folder = folder_of(tmp_path, tokenizer, generation={"eos_token_id": eos}, **config)
    loaded = load_tokenizer(folder)
    if isinstance(template, dict):
        loaded.chat_template = template
    marks = text_marks(loaded, generation_eos_ids(folder))
    assert tuple(VOCABULARY[i] for i in marks) == expected


def test_an_ordinary_token_of_the_generation_config_separates_nothing(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<|im_end|>": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<|im_end|>"])
    folder = folder_of(tmp_path, tokenizer, eos_token="<|im_end|>", chat_template="{{ messages }}<|im_end|>")
    with pytest.raises(
        ValueError, match="only tokens of its chat template to separate documents with: name a pad_token"
    ):
        text_marks(load_tokenizer(folder), [1])


# tokens that the model does not have


@pytest.mark.parametrize("kind", ["pad", "ordinary", "special"])
def test_a_token_beyond_the_embedding_is_one_sentence_before_weights_are_read(
    kind, tokenizer, tiny_model_folder, tmp_path
):
    shutil.copytree(tiny_model_folder, tmp_path, dirs_exist_ok=True)
    grown = copy.deepcopy(tokenizer)
    if kind == "pad":
        grown.add_special_tokens({"pad_token": "[PAD]"})
    else:
        grown.add_tokens([AddedToken("[NEW]", special=kind == "special")], special_tokens=kind == "special")
    grown.save_pretrained(tmp_path)
    check_token_ids(grown, 258, "a model")
    if kind == "special":  # Gemma 3 1B has one: text does not give it
        lm = load_model(str(tmp_path))
        tokens_BL = torch.tensor([[1, 257]])
        for function in [
            lambda: lm.run(tokens_BL, tokens_BL > 0),
            lambda: lm.activations(tokens_BL, tokens_BL > 0, [0]),
        ]:
            with pytest.raises(ValueError, match="has the token id 257, but .* embeds only 257"):
                function()
        return
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 tokens beyond the 257 rows .* such as '\[(PAD|NEW)\]' \(257\): take"):
        load_model(str(tmp_path))
