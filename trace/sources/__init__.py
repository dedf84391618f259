"""Data sets as labelled documents: text and row files, folders, the `datasets` library, chats."""

from trace.sources.documents import Prompt, Tally, Text
from trace.sources.reading import read_texts
from trace.sources.text_files import SEPARATOR
from trace.sources.tokenizing import tokenize

__all__ = ["SEPARATOR", "Prompt", "Tally", "Text", "read_texts", "tokenize"]
