"""Text, from a dataset to batches of token ids:  rows -> documents -> chats -> contexts -> batches."""

from .batches import Prefetched, TextBatches, open_batches
from .chats import default_system_prompt
from .contexts import ChatContexts, MixedContexts, PackedContexts
from .documents import CHAT_DATASET, EVAL_DATASET, Documents, estimate_tokens, open_documents
from .rows import BUILT_IN, FileRows, HubRows, python_stdlib
from .stream import Stream, is_held_out

__all__ = [
    "BUILT_IN",
    "CHAT_DATASET",
    "EVAL_DATASET",
    "ChatContexts",
    "Documents",
    "FileRows",
    "HubRows",
    "MixedContexts",
    "PackedContexts",
    "Prefetched",
    "Stream",
    "TextBatches",
    "default_system_prompt",
    "estimate_tokens",
    "is_held_out",
    "open_batches",
    "open_documents",
    "python_stdlib",
]
