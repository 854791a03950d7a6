"""Which device the work runs on."""

import torch

from dncbm.errors import UserError


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu, whichever is there first; any other name is taken as it is.

    Raises:
        UserError: torch knows no such device, or it is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}; use auto, cpu, cuda or mps") from error
    return device
