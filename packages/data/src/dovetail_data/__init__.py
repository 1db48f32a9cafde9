"""Deterministic, step-addressable data pipelines.

Importing this package imports NumPy and xxhash; Grain and jax are imported by what needs them (`Plan.loader`,
`Plan.at`).
"""

from dovetail_data._errors import CacheError, CorpusError
from dovetail_data.bounds import WithBos, WithoutEos
from dovetail_data.build import Progress, build_cache
from dovetail_data.cache import TokenCache
from dovetail_data.chat import ChatEncoder
from dovetail_data.corpus import Corpus, Document, Summary, concatenate, from_documents
from dovetail_data.explain import Explanation, Piece
from dovetail_data.hf_files import hf_dataset
from dovetail_data.megatron import MegatronTokens, write_megatron
from dovetail_data.mixture import Mixture
from dovetail_data.packed import Yield
from dovetail_data.permutation import Permutation
from dovetail_data.planning import Plan
from dovetail_data.record_files import array_records, bagz_records
from dovetail_data.sources import jsonl, open_corpus, parquet, text_files
from dovetail_data.stdlib import python_corpus
from dovetail_data.tar_files import webdataset
from dovetail_data.token_files import FileTokens
from dovetail_data.tokens import TokenSource, TokenView
from dovetail_data.unigram import token_counts, unigram_bits_per_byte

__all__ = [
    "CacheError",
    "ChatEncoder",
    "Corpus",
    "CorpusError",
    "Document",
    "Explanation",
    "FileTokens",
    "MegatronTokens",
    "Mixture",
    "Permutation",
    "Piece",
    "Plan",
    "Progress",
    "Summary",
    "TokenCache",
    "TokenSource",
    "TokenView",
    "WithBos",
    "WithoutEos",
    "Yield",
    "array_records",
    "bagz_records",
    "build_cache",
    "concatenate",
    "from_documents",
    "hf_dataset",
    "jsonl",
    "open_corpus",
    "parquet",
    "python_corpus",
    "text_files",
    "token_counts",
    "unigram_bits_per_byte",
    "webdataset",
    "write_megatron",
]
