"""Words of a prompt that a model was never taught."""

from __future__ import annotations

from typing import Any


def unknown_words(pipe: Any, prompt: str) -> list[str]:
    """The words for which a pipeline's tokenizer has no token, in their order; empty where it spells any word.

    The built-in models know a few dozen words and read any other as the same unknown one.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None or not getattr(tokenizer, "is_fast", False):
        return []
    found = tokenizer(prompt, return_offsets_mapping=True)
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    words = (prompt[begin:end] for number, (begin, end) in places if number == unknown)
    return list(dict.fromkeys(word for word in words if any(map(str.isalnum, word))))


def note_on(words: list[str]) -> str:
    """A sentence for who wrote the prompt; empty without such words."""
    return f"The model was never taught {', '.join(map(repr, words))}." if words else ""
