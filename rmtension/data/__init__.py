"""Preference pairs: from files, data sets, tables, lists and public benchmarks, and as batches of tokens."""

from rmtension.data import benchmarks, subtasks
from rmtension.data._chat import Message
from rmtension.data._encoding import encode_pairs
from rmtension.data._pair import PreferencePair, join_prompt
from rmtension.data._pairs import PreferencePairs
from rmtension.data._refusals import label_refusals, refuses

__all__ = [
    "Message",
    "PreferencePair",
    "PreferencePairs",
    "benchmarks",
    "encode_pairs",
    "join_prompt",
    "label_refusals",
    "refuses",
    "subtasks",
]
