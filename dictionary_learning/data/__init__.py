"""Text, from a dataset to batches of token ids:

readers -> sources -> rows and hub -> documents -> chats -> contexts -> batches
"""

from .batches import MARK, PADDING, TEXT, Prefetched, TextBatches, open_batches
from .chats import default_system_prompt
from .contexts import ChatContexts, Context, Marks, MixedContexts, PackedContexts
from .documents import CHAT_DATASET, EVAL_DATASET, Documents, estimate_tokens, open_documents, overlap
from .hub import HubRows
from .rows import FileRows, python_stdlib
from .sources import BUILT_IN, Source
from .stream import Stream, is_held_out, skipped_sentence

__all__ = [
    "BUILT_IN",
    "CHAT_DATASET",
    "EVAL_DATASET",
    "MARK",
    "PADDING",
    "TEXT",
    "ChatContexts",
    "Context",
    "Documents",
    "FileRows",
    "HubRows",
    "Marks",
    "MixedContexts",
    "PackedContexts",
    "Prefetched",
    "Source",
    "Stream",
    "TextBatches",
    "default_system_prompt",
    "estimate_tokens",
    "is_held_out",
    "open_batches",
    "open_documents",
    "overlap",
    "python_stdlib",
    "skipped_sentence",
]
