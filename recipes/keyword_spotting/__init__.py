"""Keyword spotting: a small network that reads one second of sound."""

from .network import KeywordNetwork as KeywordNetwork
