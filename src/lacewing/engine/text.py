"""Text <-> token ids, and conversations -> prompts."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from lacewing.errors import CheckpointError, RequestError, UnsupportedModelError

if TYPE_CHECKING:
    from lacewing.checkpoint import TokenizerFiles
    from lacewing.engine.template import ChatTemplate

__all__ = ["StreamDecoder", "Text"]

Message = Mapping[str, Any]


class Text:
    """The tokenizer and the chat template of one model.

    Special tokens that are written out in a text (`<|im_end|>` typed by a user) are read as special
    tokens, as in Hugging Face's tokenizers: whoever puts a stranger's words into a prompt and does
    not want that must take them out before.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises `CheckpointError` if the tokenizer cannot be read."""
        self.bos_token_id = files.bos_token_id
        self.eos_token_ids = frozenset(files.eos_token_ids)
        self.chat_template = files.chat_template
        self._files = files
        self._tokenizer = _load(files.tokenizer_json)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in self._added.items() if token.special)
        self._to_bytes, self._strips = _byte_rule(self._tokenizer)
        self._known: dict[int, bytes] = {}

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`. `add_special` puts the beginning-of-sequence token in front where
        the model wants one, and never twice.

        Raises `RequestError` for what is not Unicode text.
        """
        if not isinstance(text, str):
            raise RequestError(f"text to encode: needs a str, got {type(text).__name__}")
        try:
            # What a prompt begins with is decided here, not by the file's post-processor, which
            # may disagree with the rest of the configuration or end the prompt as well.
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(f"text to encode: needs valid Unicode, got {error}") from error
        bos = self.bos_token_id
        if add_special and self._files.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. `continues`: the ids go on from
        others, so a space that the tokenizer puts before every text is a real one."""
        decoder = self.stream_decoder(skip_special, continues)
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def stream_decoder(self, skip_special: bool = True, continues: bool = False) -> StreamDecoder:
        """A decoder for one sequence; its pieces join to what `decode` gives."""
        hidden = self._special if skip_special else frozenset()
        return StreamDecoder(self._token_bytes, hidden, self._strips and not continues)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation, as text; `variables` are the template's own (`tools`, ...).

        Raises `RequestError` if the model has no template or the template refuses the messages,
        `CheckpointError` if the template is broken or takes too much.
        """
        return self._template.render(messages, add_generation_prompt, **variables)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The prompt of a conversation, as token ids. The template writes every special token, so
        none is added."""
        prompt = self.apply_chat_template(messages, add_generation_prompt, **variables)
        return self.encode(prompt, add_special=False)

    @cached_property
    def _template(self) -> ChatTemplate:
        # Jinja is loaded only where a template is used.
        from lacewing.engine.template import ChatTemplate

        if self.chat_template is None:
            raise RequestError(
                "the model has no chat template",
                hint="use `--raw` (or `generate`) to continue a text instead",
            )
        return ChatTemplate(self.chat_template, self._files.bos_token, self._files.eos_token)

    def _token_bytes(self, token: int) -> bytes:
        """UTF-8 of one token, which may begin or end within a character; empty for an id that the
        tokenizer does not have (embeddings are often padded)."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._find_bytes(token)
        return known

    def _find_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        try:
            piece = self._tokenizer.id_to_token(token)
        except (OverflowError, TypeError) as error:
            raise RequestError(f"token to decode: needs an id, got {token!r}") from error
        return b"" if piece is None else self._to_bytes(piece)


class StreamDecoder:
    """Token ids in, text out, whole characters only: bytes wait until their character is complete.

    Bytes that no character can begin with come out as U+FFFD at once, an unfinished character on
    `flush`.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], hidden: frozenset[int], strip: bool
    ) -> None:
        """`hidden` tokens have no text. `strip` takes one space from the start of the text."""
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._strip = strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Takes the next token: the characters it completes, often none or several."""
        if token in self._hidden:
            return ""
        return self._stripped(self._utf8.decode(self._token_bytes(token)))

    def flush(self) -> str:
        """The end of the sequence: U+FFFD for an unfinished character."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _load(tokenizer_json: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"tokenizer: needs a tokenizer.json of the `tokenizers` library, got {error}"
        ) from error


# Tokens to bytes -----------------------------------------------------------------------------


def _byte_rule(tokenizer: Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """(bytes of a token, whether the decoder strips a space from the start), by the kind of
    decoder. The library's own `decode` works on whole sequences and loses half characters."""
    kinds = _decoder_kinds(tokenizer)
    if kinds[-1:] == ["ByteLevel"]:
        return _byte_level, False
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return _byte_fallback, "Strip" in kinds or "Metaspace" in kinds
    raise UnsupportedModelError(
        f"tokenizer decoder: needs ByteLevel, or Replace with ByteFallback, "
        f"got {' + '.join(kinds) or 'none'}"
    )


def _decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"null"
    decoder = json.loads(state)
    if decoder is None:
        return []
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts]


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's letter for every byte: printable Latin-1 as itself, the rest from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    letters = [chr(byte) for byte in shown] + [chr(0x100 + i) for i in range(len(rest))]
    return dict(zip(letters, shown + rest, strict=True))


_BYTE_OF = _gpt2_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF[letter] for letter in piece])
    except KeyError:  # not in the alphabet: a token that stands for itself
        return piece.encode()


def _byte_fallback(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("▁", " ").encode()
