"""Normalisation of texts and prompts, by which repeated ones are found."""

from hashlib import blake2b
from unicodedata import normalize

from mpo_lightning.batch import Prompt
from mpo_lightning.data.conversation import as_messages

__all__ = ["normalized", "prompt_key"]


def normalized(text: str) -> str:
    """Return a text without differences of case and white space.

    Compatibility forms of a character become one (NFKC: a full-width letter is the letter).
    Punctuation counts.
    """
    if not text.isascii():
        text = normalize("NFKC", text)
    return " ".join(text.casefold().split())


def prompt_key(prompt: Prompt, *, size: int = 8, salt: bytes = b"") -> bytes:
    """Return a hash of a prompt, the same for prompts that are the same when normalised.

    A text is one user message; roles, and the order of the messages, count.

    Args:
        prompt: text or conversation.
        size: bytes of the hash. With 8 bytes, the probability that any two of a million different
            prompts share a hash is 3e-8.
        salt: up to 16 bytes; hashes with different salts are unrelated.
    """
    # Normalised texts contain neither separator: both are white space.
    whole = "\x1e".join(f"{m['role']}\x1f{normalized(m['content'])}" for m in as_messages(prompt))
    return blake2b(whole.encode(), digest_size=size, salt=salt).digest()
