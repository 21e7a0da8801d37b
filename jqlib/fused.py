"""Several passes over a large tensor made one, by torch.compile where a C++ compiler is at hand; else as written."""

import logging
import warnings
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

log = logging.getLogger(__name__)

VARIANTS = 64  # of a function: for dtypes, groups ragged or not, and the like; torch's own limit is 8
LARGE = 2**16  # numbers; below it there is nothing to win


def fused(function: Callable) -> Callable:
    """``function`` of a tensor on the processor and more; its result may differ in the last digits once compiled.

    No gradients pass.
    """
    compiled, fails = None, False

    @wraps(function)
    def run(x: Tensor, *more):
        nonlocal compiled, fails
        # a parameter would be compiled for its own shape alone
        x, *more = (part.detach() if isinstance(part, Tensor) else part for part in (x, *more))
        if fails or x.numel() < LARGE or x.device.type != "cpu":
            return function(x, *more)
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # or it is compiled for each state of these
                if compiled is None:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # torch's own, about itself
                        compiled = torch.compile(function, dynamic=True, recompile_limit=VARIANTS)
                        return compiled(x, *more)  # it is compiled now
                return compiled(x, *more)
        except Exception as error:  # torch names no type for what its compilers may raise
            fails = True
            log.info("%s runs as it is written: torch.compile said %s", function.__name__, str(error).split("\n")[0])
            return function(x, *more)

    return run
