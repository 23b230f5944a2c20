"""The project's exceptions: the library raises them, the commands print them as one sentence.

Every message names the file, the cause and the way out, because it is all that a user will see.
"""


class TrimError(Exception):
    """Base of everything this project raises on purpose; commands exit with 1 on it."""


class FileFormatError(TrimError):
    """A file is not what it should be: not a GGUF, truncated, of another version, already trimmed."""


class VocabularyMismatch(TrimError):
    """Two files meet whose vocabularies differ."""


class FetchError(TrimError):
    """A model could not be brought to this machine."""


class EngineError(TrimError):
    """llama.cpp refused to load, decode or rewind."""


class SettingError(EngineError, ValueError):
    """A setting that nothing can be computed with, such as a grammar that does not parse or that lets no token come."""


class TextError(SettingError):
    """A text that cannot be tokenized: llama.cpp would end the process over it, or hold everybody up."""


class PromptTooLong(TextError):
    """A prompt that cannot be read in the context, whatever its tokens are."""
