"""Asking the hub, or not: what its library prints, whether it answers, and why something was not loaded, in one line."""

import functools
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from dncbm.runs.errors import first_line
from dncbm.runs.settings import EncoderEntry

HUB = "hf-hub:"
"""What precedes a repository of the hub in place of a model of open_clip."""


@contextmanager
def quiet_hub(uses_hub: bool) -> Iterator[None]:
    """What open_clip logs inside is not printed, since it is an error here or of no interest.

    If the hub is used but does not answer, it is not asked: its library would retry for a minute and say so in every line.
    """
    import huggingface_hub.constants as hub

    was_offline, was_disabled = hub.HF_HUB_OFFLINE, logging.root.manager.disable
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
    logging.disable(logging.ERROR)
    hub.HF_HUB_OFFLINE = was_offline or (uses_hub and not hub_answers())
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = was_offline
        logging.disable(was_disabled)


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached, asked once and through the proxy that its library uses."""
    import huggingface_hub.constants as hub
    from huggingface_hub.utils import get_session

    try:
        get_session().head(hub.ENDPOINT, timeout=5)
    except Exception:
        return False
    return True


def why_not_loaded(error: Exception, uses_hub: bool) -> str:
    """Why something was not loaded: without a hub, its library's advice would mislead."""
    import huggingface_hub.constants as hub

    is_silent = uses_hub and (hub.HF_HUB_OFFLINE or not hub_answers())
    if is_silent and any(isinstance(one, OSError) for one in _causes(error)):
        silent = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else f"the hub {hub.ENDPOINT} does not answer"
        return f"{silent}, and the files are not in the cache {hub.HF_HUB_CACHE}"
    return why_unreadable(error)


def why_unreadable(error: BaseException) -> str:
    """Why a file of tensors was not loaded, in one line."""
    if any(isinstance(one, pickle.UnpicklingError) for one in _causes(error)):  # torch's text advises to switch its safety off
        return "it is no file of tensors, or holds other objects too, which are never loaded because they can run code"
    if isinstance(error, StopIteration):
        return "it holds no weights"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "loading state_dict" in lines[0]:
        return f"the weights are of another model: {lines[1][:160].rstrip('. ')}{'...' if len(lines[1]) > 160 else ''}"
    return first_line(error)[:300]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def published_on_hub(entry: EncoderEntry) -> str | None:
    """The hub's repository of an encoder's weights, if open_clip fetches them from there."""
    import open_clip

    if entry.model.startswith(HUB):
        return entry.model.removeprefix(HUB)
    tag = open_clip.get_pretrained_cfg(entry.model.replace("/", "-"), entry.pretrained or "") or {}
    return str(tag.get("hf_hub", "")).strip("/") or None
