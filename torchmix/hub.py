"""Whether the hub of models and data sets answers (L6): asked once and briefly, before anything waits for it.

huggingface_hub itself tries for half a minute for each file, which is long where a name was only mistyped.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_SECONDS = 3.0


def why_unreachable(name: str | os.PathLike[str]) -> str:
    """Why the hub cannot be asked for a name, in words; "" where it answers, or need not be asked.

    One request with a time limit of ``HUB_SECONDS`` to the address of ``HF_ENDPOINT``, through the proxies that
    huggingface_hub uses; any answer will do.

    Args:
        name: local file or directory, or id on the hub.
    """
    text = os.fspath(name)
    if Path(text).exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        return ""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # noqa: BLE001 (of whichever HTTP client huggingface_hub uses)
        return f"{constants.ENDPOINT}: {str(error) or type(error).__name__}"
    return ""
