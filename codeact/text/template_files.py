"""Templates of one's own, in files: what a setting may name beside the formats that codeact knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from codeact.base.errors import InputError
from codeact.base.parsing import read_file


def template_text(name: str) -> str:
    """What a template is named by: of a file its text, so that whatever is kept with it follows the content.

    Args:
        name: a name, the text of a template, or a file with one; a file has an ending or a folder in its name.

    Raises:
        InputError: there is no such file, or it holds no template.
    """
    if "{" in name or not (Path(name).suffix or os.sep in name):
        return name
    try:
        text = read_file(Path(name).expanduser()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise InputError(f"cannot read the template {name}: {reason}; give a file with a Jinja template") from None
    if not is_jinja(text) and "{question}" not in text:
        raise InputError(f"{name} is no chat template: it has to loop over messages, as tokenizers' own do in Jinja")
    return text


def is_jinja(text: str) -> bool:
    """Whether a text is a chat template, a program over ``messages``, and not a template's name."""
    return "messages" in text and ("{%" in text or "{{" in text)


Template = Annotated[str, AfterValidator(template_text)]
"""A field that names a template; it holds the text of a file."""
