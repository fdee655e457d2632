"""codeact: fine-tune a code model on the part of the data that teaches most."""

__version__ = "0.1.0"
