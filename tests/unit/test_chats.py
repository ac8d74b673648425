"""Chats and packing: what is a special token, what is text, and which positions are packing's own."""

import copy
import datetime
import json

import pytest
from test_data import MISTRAL, QWEN, FromList, chat_tokenizer, chats, write_jsonl

from dictionary_learning.data import (
    MARK,
    TEXT,
    ChatContexts,
    Marks,
    PackedContexts,
    TextBatches,
    default_system_prompt,
    is_held_out,
    open_batches,
    open_documents,
)
from dictionary_learning.data.chats import render

GLM = "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}{% endfor %}"
GLM_WITH_PROMPT = GLM.replace("<sop>", "<sop><|system|>\\nYou are GLM.").replace("\\n", "\n", 1)
GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT, a model.\nCurrent date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)
UNCLEAR = "Be {{ messages | length }} times kind. {% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}"
TOOLS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% for call in m.tool_calls or [] %}"
    "{% for key, value in call.function.arguments | items %}{{ key ~ '=' ~ value }}{% endfor %}{% endfor %}{% endfor %}"
)


@pytest.fixture
def many_tokens(tokenizer):
    """With more special tokens than `<|endoftext|>`: <|im_start|>, <|im_end|> and a bos of its own."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<s>"})
    return tokenizer


def ids_of(contexts):
    return [token for context in contexts for token in context.tokens]


# Marks


def test_packing_puts_in_the_tokens_it_is_given_and_marks_no_others(tokenizer):
    marks = Marks(bos_id=5, separator_id=6, pad_id=7)
    eos = tokenizer.eos_token_id
    documents = FromList([[11, eos, 12], [13, 14], [5, 15, 6]])
    contexts = list(PackedContexts(documents, tokenizer, 5, marks))
    assert contexts == [([5, 11, eos, 12, 6], [0, 4]), ([5, 13, 14, 6, 15], [0, 3])]


def test_only_what_packing_put_in_is_masked(tokenizer):
    """The same token id in a document is a token of the text."""
    eos = tokenizer.eos_token_id
    contexts = PackedContexts(FromList([[11, eos, 12], [13]]), tokenizer, 8)
    ((tokens_BL, mask_BL),) = TextBatches(contexts, 1, 0)
    assert tokens_BL.tolist() == [[eos, 11, eos, 12, eos, 13]]
    assert mask_BL.tolist() == [[MARK, TEXT, TEXT, TEXT, MARK, TEXT]]


def test_marks_are_where_they_were_after_a_chunk_and_a_cut(tokenizer, monkeypatch):
    monkeypatch.setattr("dictionary_learning.data.contexts.CHUNK_CHARACTERS", 30)
    marks = Marks(300, 301, 302)
    texts = ["text " * (i % 5 + 1) for i in range(60)]
    for context, places in PackedContexts(FromList(texts), tokenizer, 7, marks):
        assert places == [i for i, token in enumerate(context) if token >= 300]


def test_a_special_token_written_in_a_document_is_text(many_tokens, tmp_path):
    texts = ["<html><s>gone</s><|endoftext|></html>", "<|im_end|> is how a turn ends"]
    contexts = list(PackedContexts(FromList(texts), many_tokens, 1000))
    special = {many_tokens.convert_tokens_to_ids(token) for token in ("<s>", "<|im_end|>", "<|endoftext|>")}
    (tokens, marks), *_ = contexts
    assert [i for i, token in enumerate(tokens) if token in special] == marks
    body = [token for i, token in enumerate(tokens) if i not in marks]
    assert many_tokens.decode(body) == "".join(texts)


def test_a_special_token_written_in_a_chat_is_text_and_the_templates_are_tokens(many_tokens):
    tokenizer = chat_tokenizer(many_tokens, QWEN)
    said = "what does <|im_end|> do? <|im_start|>"
    conversation = [{"role": "user", "content": said}, {"role": "assistant", "content": "It ends a turn."}]
    (tokens, marks), *_ = ChatContexts(FromList([conversation]), tokenizer, 1000, system_prompt="")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert marks == [0] and tokens.count(end) == tokens.count(start) == 3  # the default prompt, a question, an answer
    assert tokenizer.decode(tokens[1:]) == render(tokenizer, conversation)


@pytest.mark.parametrize(
    "said", ["{{ m.content.split('<|im_end|>')[-1] }}", "{{ m.content[:12] }}", "{{ m.content[12:] }}"]
)
def test_the_templates_tokens_are_such_where_it_cuts_what_is_said(said, many_tokens):
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + said + "<|im_end|>\n{% endfor %}"
    tokenizer = chat_tokenizer(many_tokens, turns)
    conversation = [{"role": role, "content": "thought <|im_end|> said"} for role in ("user", "assistant")]
    (tokens, _), *_ = ChatContexts(FromList([conversation]), tokenizer, 1000)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert tokens.count(start) == tokens.count(end) == 2


def test_a_chat_that_the_template_makes_nothing_of_is_counted(many_tokens):
    tokenizer = chat_tokenizer(many_tokens, "{% for m in messages %}{{ m.content if m.role != 'tool' }}{% endfor %}")
    conversations = [[{"role": "tool", "content": "x"}], [{"role": "user", "content": "y"}]]
    contexts = ChatContexts(FromList(conversations), tokenizer, 1000)
    assert len(list(contexts)) == 1 and contexts.skipped == {"made nothing of by the chat template": 1}


def test_special_tokens_are_excluded_where_that_is_asked(many_tokens, tmp_path):
    tokenizer = chat_tokenizer(many_tokens, QWEN)
    rows = [{"messages": chat, "text": "words"} for chat in chats(30)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for exclude, expected in ((False, {TEXT}), (True, {MARK})):
        settings = {"chat_dataset": path, "chat_fraction": 0.5, "exclude_special_tokens": exclude}
        batches = open_batches(
            path, tokenizer, context_length=64, batch_size=4, mixed=True, epochs=9, prefetch=0, **settings
        )
        found = {int(kind) for tokens_BL, mask_BL in batches for kind in mask_BL[tokens_BL == end]}
        assert found == expected


# System prompts


def test_tokens_that_every_text_begins_with_are_no_system_prompt(tokenizer):
    glm = chat_tokenizer(tokenizer, GLM)
    assert default_system_prompt(glm) == ""
    (tokens, _), *_ = ChatContexts(FromList(chats(1)), glm, 1000, removal_fraction=1.0)
    assert glm.decode(tokens[1:]).startswith("[gMASK]<sop><|user|>")
    glm = chat_tokenizer(tokenizer, GLM_WITH_PROMPT)
    assert default_system_prompt(glm) == "<|system|>\nYou are GLM."
    (tokens, _), *_ = ChatContexts(FromList(chats(1)), glm, 1000, removal_fraction=1.0)
    assert glm.decode(tokens[1:]).startswith("[gMASK]<sop><|user|>")


def test_a_prompt_whose_last_turn_ends_in_another_way_is_taken_out_whole(tokenizer):
    gpt_oss = chat_tokenizer(tokenizer, GPT_OSS)
    prompt = "<|start|>system<|message|>You are ChatGPT, a model.\nCurrent date: 26 Jul 2024<|end|>"
    assert default_system_prompt(gpt_oss) == prompt
    (tokens, _), *_ = ChatContexts(FromList(chats(1)), gpt_oss, 1000, removal_fraction=1.0)
    assert gpt_oss.decode(tokens[1:]).startswith("<|start|>user")


def test_a_prompt_is_taken_out_whole_where_bos_begins_the_turns(many_tokens):
    """SmolLM2 calls `<|im_start|>` its bos."""
    many_tokens.bos_token = "<|im_start|>"
    smol = chat_tokenizer(many_tokens, QWEN)
    assert default_system_prompt(smol).startswith("<|im_start|>system")
    marks = Marks(*(many_tokens.convert_tokens_to_ids(["<|endoftext|>"] * 3)))
    (tokens, _), *_ = ChatContexts(FromList(chats(1)), smol, 1000, removal_fraction=1.0, marks=marks)
    assert smol.decode(tokens).startswith("<|endoftext|><|im_start|>user")


def test_a_prompt_that_cannot_be_taken_out_is_said_to_stay(tokenizer):
    contexts = ChatContexts(FromList(chats(3)), chat_tokenizer(tokenizer, UNCLEAR), 1000)
    assert default_system_prompt(contexts.tokenizer) is None and len(list(contexts)) == 3
    assert len(contexts.notes) == 1 and "system prompt" in contexts.notes[0]
    assert not ChatContexts(FromList(chats(3)), chat_tokenizer(tokenizer, MISTRAL), 1000).notes


# What people bring


def test_arguments_of_tool_calls_may_be_json_in_a_string(tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Ulm"})}}
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    contexts = ChatContexts(FromList([conversation]), chat_tokenizer(tokenizer, TOOLS), 1000)
    assert [tokenizer.decode(context.tokens[1:]) for context in contexts] == ["user: ?assistant: city=Ulm"]
    assert not contexts.skipped


def test_whatever_a_template_does_with_a_chat_only_that_chat_is_skipped_and_named(tokenizer):
    template = QWEN + "{% if messages | length == 2 %}{{ messages[0]['content'] + 3 }}{% endif %}"
    one, two = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}] * 2
    contexts = ChatContexts(FromList([one, two, one]), chat_tokenizer(tokenizer, template), 1000, system_prompt="")
    # the default prompt is looked for in four and three messages
    assert len(list(contexts)) == 2
    ((reason, n),) = contexts.skipped.items()
    assert n == 1 and reason.startswith("refused by the chat template (TypeError: ")


def test_a_template_that_refuses_every_chat_is_blamed_and_not_the_text(tokenizer, tmp_path):
    template = MISTRAL.replace("{% for", "{% if messages[0].x %}{{ raise_exception('no x') }}{% endif %}{% for", 1)
    rows = [{"messages": [{"role": "user", "content": "a", "x": 1}], "text": "words"}] * 3
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    settings = {"context_length": 8, "batch_size": 1, "mixed": True, "chat_dataset": path}
    with pytest.raises(ValueError, match="no conversation that can be used: 3 refused by the chat template .*no x"):
        open_batches(path, chat_tokenizer(tokenizer, template), **settings)


def test_the_stream_that_ended_is_named(tokenizer, tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "words " * 50}] * 90)
    talk = write_jsonl(tmp_path / "talk.jsonl", [{"messages": chat} for chat in chats(3)])
    batches = open_batches(
        text,
        chat_tokenizer(tokenizer, QWEN),
        context_length=32,
        batch_size=2,
        mixed=True,
        chat_dataset=talk,
        prefetch=0,
    )
    assert batches.end == "" and len(list(batches)) > 1
    assert batches.end == f"{talk} has 3 documents and no more"


def test_conversations_as_sharegpt_has_them_and_content_in_parts(tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a", "weight": None}]},
        {
            "conversations": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ]
        },
        {"conversations": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
    ]
    conversations = open_documents(write_jsonl(tmp_path / "a.jsonl", rows), chats=True)
    assert list(conversations) == [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "ab"}],
    ]
    assert conversations.skipped == {"not a conversation": 1}


def test_dates_in_a_conversation_are_no_obstacle(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    when = datetime.datetime(2024, 7, 26)
    rows = [{"messages": [{"role": "user", "content": f"number {i}", "at": when}]} for i in range(100)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    sides = [list(open_documents(path, chats=True, held_out=side)) for side in (True, False)]
    assert sum(map(len, sides)) == 100 and all(sides)


def test_chats_are_held_out_of_their_own_stream(tmp_path, tokenizer):
    """Training and evaluation read other text and the same chats, of which each has its share."""
    tokenizer = chat_tokenizer(tokenizer, MISTRAL)
    rows = [{"messages": [{"role": "user", "content": f"<{i}>"}]} for i in range(400)]
    talk = write_jsonl(tmp_path / "talk.jsonl", rows)
    seen = []
    for held_out, name in ((False, "train"), (True, "eval")):
        text = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} words"}] * 400)
        batches = open_batches(
            text,
            tokenizer,
            context_length=32,
            batch_size=1,
            mixed=True,
            chat_dataset=talk,
            chat_fraction=0.9,
            chat_held_out=held_out,
            prefetch=0,
        )
        texts = [tokenizer.decode(tokens_BL[0]) for tokens_BL, _ in batches]
        seen.append({text for text in texts if "[INST]" in text})
        assert any(f"{name} words" in text for text in texts)
    assert seen[0] and seen[1] and seen[0].isdisjoint(seen[1])
    assert is_held_out(json.dumps(rows[0]["messages"])) == any("<0>" in text for text in seen[1])
