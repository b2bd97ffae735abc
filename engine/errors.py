"""Everything the engine raises on purpose.

EngineError
├── GGUFFormatError       the file is broken, cut short or not GGUF
├── UnsupportedModel      an architecture, or a setting of it, that no model file here runs
├── UnsupportedQuant      a tensor type that cannot be decoded, or encoded
├── UnsupportedTokenizer  a tokenizer or pre-tokenizer that is not known
├── StateError            a saved state that is damaged, or of another version, model or cache
└── CapacityError         a batch, a sequence or a model to be locked that does not fit its memory

Wrong calls raise ValueError or TypeError; a file that cannot be opened raises the operating system's OSError.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of the errors that a caller can act on."""


class GGUFFormatError(EngineError):
    """The file breaks the GGUF format; says where and what was expected."""


class UnsupportedModel(EngineError):
    """The architecture, or a switch in its metadata, is not one that the engine computes."""


class UnsupportedQuant(EngineError):
    """A tensor's type cannot be decoded, or weights not encoded in it."""


class UnsupportedTokenizer(EngineError):
    """The vocabulary's model or pre-tokenizer is not known."""


class StateError(EngineError):
    """A file of saved sequences cannot be restored here."""


class CapacityError(EngineError):
    """A batch, a sequence or a cache does not fit its allocation, or a model what may be locked."""
