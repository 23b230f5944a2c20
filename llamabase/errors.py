"""The project's exceptions: the library raises them, and the commands print them as one sentence.

Every message names the file, the cause and the way out, because a user will see nothing else.
"""


class TrimError(Exception):
    """Base of everything this project raises on purpose; commands exit with 1 on it."""


class FileFormatError(TrimError):
    """A file is not what it should be: not a GGUF, truncated, of an unknown version, already trimmed."""


class VocabularyMismatch(TrimError):
    """The vocabularies of two files differ."""


class FetchError(TrimError):
    """A model could not be brought to this machine."""


class EngineError(TrimError):
    """llama.cpp refused to load, decode or rewind."""


class SettingError(EngineError, ValueError):
    """An invalid setting, such as a grammar that does not parse or that allows no token."""


class TextError(SettingError):
    """A text that cannot be tokenized: llama.cpp would end the process over it, or take minutes."""


class PromptTooLong(TextError):
    """A prompt that is too long for the context."""
