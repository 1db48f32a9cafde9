import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dovetail_text import Tokenizer, train_bpe

TEXTS = [
    "def main():\n    return 0\n\n\nclass A:\n    x = 1234567\n" * 3,
    "The quick brown fox, they're jumping over the lazy dog.  Süße Grüße, 日本語テキスト 🙂 🙂🙂\n" * 3,
    "user assistant system tool think question answer is to be or not to be\n" * 3,
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 380)


@pytest.fixture(scope="session")
def llama_like() -> Tokenizer:
    """A BPE with byte fallback and a space before the first word only, as SentencePiece exports look."""
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    ascii_texts = [text.encode("ascii", "ignore").decode() for text in TEXTS]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    engine.train_from_iterator(ascii_texts, trainer)
    engine.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    spec = json.loads(engine.to_str())
    size = max(spec["model"]["vocab"].values()) + 2
    spec["model"]["vocab"] |= {f"<0x{b:02X}>": size + b for b in range(256)}
    return Tokenizer(json.dumps(spec), eos_tokens=["</s>"], named={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    engine = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    engine.train_from_iterator(TEXTS, trainer)
    return Tokenizer(engine.to_str(), eos_tokens=["[SEP]"])
