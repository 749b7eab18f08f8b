"""When two texts, or two prompts, count as the same."""

from hashlib import blake2b
from unicodedata import normalize

from mpo_lightning.batch import Message

__all__ = ["normalized", "prompt_key"]


def normalized(text: str) -> str:
    """The text without what a reader does not see: case, kinds and amounts of white space.

    Compatible characters are one (NFKC: a full-width letter is the letter). Punctuation counts.
    """
    if not text.isascii():
        text = normalize("NFKC", text)
    return " ".join(text.casefold().split())


def prompt_key(prompt: str | list[Message], *, size: int = 8, salt: bytes = b"") -> bytes:
    """A hash of a prompt: the same for prompts that are the same when normalised.

    A text is one user message; roles, and the order of the messages, count.

    Args:
        prompt: text or conversation.
        size: bytes of the hash. Of a million different prompts two share one of 8 bytes with a
            probability of 3e-8.
        salt: up to 16 bytes; another salt gives hashes that have nothing to do with these.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    # Normalised texts hold neither separator: both are white space.
    whole = "\x1e".join(f"{m['role']}\x1f{normalized(m['content'])}" for m in messages)
    return blake2b(whole.encode(), digest_size=size, salt=salt).digest()
